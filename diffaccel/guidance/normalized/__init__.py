"""Normalised attention guidance: away from a negative prompt, inside of attention."""
