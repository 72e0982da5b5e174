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

from diffaccel.attach.attachment import (
    add_pipeline_method,
    restore_attn_processor,
    set_attn_processor,
)
from diffaccel.guidance.attachment import add_guidance_method, restore_guidance, set_guidance
from diffaccel.guidance.normalized.config import NormalizedAttention
from diffaccel.guidance.perturb.blocks import PermuteTokens, SkipLayers
from diffaccel.guidance.perturb.heads import HeadPerturbation
from diffaccel.layout import TokenLayout
from diffaccel.methods import (
    AgentAttn,
    FullAttn,
    HierarchicalWindowAttn,
    JitteredAttn,
    NeighborhoodAttn,
    ProportionalAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
    SparseAttn,
    TokenMergingAttn,
)

__all__ = [
    "AgentAttn",
    "FullAttn",
    "HeadPerturbation",
    "HierarchicalWindowAttn",
    "JitteredAttn",
    "NeighborhoodAttn",
    "NormalizedAttention",
    "PermuteTokens",
    "ProportionalAttn",
    "RectifiedSpaAttn",
    "SkipLayers",
    "SlidingWindowAttn",
    "SparseAttn",
    "TokenLayout",
    "TokenMergingAttn",
    "restore_attn_processor",
    "restore_guidance",
    "set_attn_processor",
    "set_guidance",
]

add_pipeline_method()
add_guidance_method()
