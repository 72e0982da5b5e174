"""Means and deviations of runs of tokens."""
