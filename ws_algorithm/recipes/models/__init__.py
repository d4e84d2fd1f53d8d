"""Builders of models, one file per task family; they know nothing of Weight Standardization."""
