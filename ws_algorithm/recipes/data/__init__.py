"""Builders of data specifications, one file per task family."""
