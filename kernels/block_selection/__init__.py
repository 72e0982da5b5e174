"""Choosing key blocks by their predicted attention, as index lists."""
