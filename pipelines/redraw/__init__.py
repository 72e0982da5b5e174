"""Redrawing part of a picture's or a clip's noise schedule with any stock pipeline."""
