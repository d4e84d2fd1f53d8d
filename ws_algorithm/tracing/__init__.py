"""Looking at a model: in which order its layers run and what follows what, without changing it."""
