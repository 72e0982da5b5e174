"""Attention methods: what is computed, independent of any model."""

from diffaccel.methods.agent import AgentAttn
from diffaccel.methods.base import Method
from diffaccel.methods.full import FullAttn
from diffaccel.methods.head_perturbation import HeadPerturbation
from diffaccel.methods.hierarchical import HierarchicalWindowAttn
from diffaccel.methods.jittered import JitteredAttn
from diffaccel.methods.neighborhood import NeighborhoodAttn
from diffaccel.methods.proportional import ProportionalAttn
from diffaccel.methods.rectified import RectifiedSpaAttn
from diffaccel.methods.sliding_window import SlidingWindowAttn
from diffaccel.methods.sparse import SparseAttn
from diffaccel.methods.token_merging import TokenMergingAttn

__all__ = [
    "AgentAttn",
    "FullAttn",
    "HeadPerturbation",
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
