"""Attention ops that a benchmark compares."""
