"""Measurements behind a figure in the documentation, one script each."""
