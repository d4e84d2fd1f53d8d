"""Published weights: reading their files, and their names and conventions to those of torchvision."""
