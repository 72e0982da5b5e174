"""Attention methods: what is computed, independent of any model."""

from diffaccel.methods.base import Method
from diffaccel.methods.block_sparse.rectified import RectifiedSpaAttn
from diffaccel.methods.block_sparse.sparse import SparseAttn
from diffaccel.methods.full import FullAttn
from diffaccel.methods.grouped.agent import AgentAttn
from diffaccel.methods.grouped.token_merging import TokenMergingAttn
from diffaccel.methods.proportional import ProportionalAttn
from diffaccel.methods.windows.hierarchical import HierarchicalWindowAttn
from diffaccel.methods.windows.jittered import JitteredAttn
from diffaccel.methods.windows.neighborhood import NeighborhoodAttn
from diffaccel.methods.windows.sliding import SlidingWindowAttn

__all__ = [
    "AgentAttn",
    "FullAttn",
    "HierarchicalWindowAttn",
    "JitteredAttn",
    "Method",
    "NeighborhoodAttn",
    "ProportionalAttn",
    "RectifiedSpaAttn",
    "SlidingWindowAttn",
    "SparseAttn",
    "TokenMergingAttn",
]
