"""Faster and higher-resolution diffusion with sparse attention."""
