"""Measures of pictures and clips, and sheets that show them side by side."""
