"""Attention methods: what is computed, independent of any model."""

from diffaccel.methods.base import Method
from diffaccel.methods.full import FullAttn
from diffaccel.methods.hierarchical import HierarchicalWindowAttn
from diffaccel.methods.neighborhood import NeighborhoodAttn
from diffaccel.methods.proportional import ProportionalAttn
from diffaccel.methods.rectified import RectifiedSpaAttn
from diffaccel.methods.sliding_window import SlidingWindowAttn
from diffaccel.methods.sparse import SparseAttn

__all__ = [
    "FullAttn",
    "HierarchicalWindowAttn",
    "Method",
    "NeighborhoodAttn",
    "ProportionalAttn",
    "RectifiedSpaAttn",
    "SlidingWindowAttn",
    "SparseAttn",
]
