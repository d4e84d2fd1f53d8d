"""The networks whose checkpoints are converted, as their own code builds them: names, shapes, order and formula."""
