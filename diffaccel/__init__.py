"""Faster and higher-resolution diffusion with sparse attention, on stock diffusers pipelines.

Importing the package gives every diffusers pipeline the method `set_attn_processor`:

    import diffaccel
    pipe.set_attn_processor(diffaccel.RectifiedSpaAttn())
"""

from diffaccel.attach import (
    add_pipeline_method,
    restore_attn_processor,
    set_attn_processor,
)
from diffaccel.layout import TokenLayout
from diffaccel.methods import (
    FullAttn,
    NeighborhoodAttn,
    ProportionalAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
    SparseAttn,
)

__all__ = [
    "FullAttn",
    "NeighborhoodAttn",
    "ProportionalAttn",
    "RectifiedSpaAttn",
    "SlidingWindowAttn",
    "SparseAttn",
    "TokenLayout",
    "restore_attn_processor",
    "set_attn_processor",
]

add_pipeline_method()
