"""Faster and higher-resolution diffusion with sparse attention, on stock diffusers pipelines."""
