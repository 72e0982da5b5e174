"""Faster and higher-resolution diffusion with sparse attention, on stock diffusers pipelines.

Importing the package gives every diffusers pipeline the method `set_attn_processor`:

    import diffaccel
    pipe.set_attn_processor(diffaccel.RectifiedSpaAttn())
"""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    # A clone's own folder, which Python finds first from the clone's root: the wheel maps the
    # folders beside it into the package.
    __path__.append(str(Path(__file__).parents[1]))

from diffaccel.attach import (
    add_pipeline_method,
    restore_attn_processor,
    set_attn_processor,
)
from diffaccel.layout import TokenLayout
from diffaccel.methods import (
    FullAttn,
    HierarchicalWindowAttn,
    NeighborhoodAttn,
    ProportionalAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
    SparseAttn,
)

__all__ = [
    "FullAttn",
    "HierarchicalWindowAttn",
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
