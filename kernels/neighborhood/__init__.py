"""Neighborhood attention: every query attends a window of the grid around it."""
