"""Attaching methods to diffusers models: processors, the attention seam, run state, reports."""
