"""Attention methods: what is computed, independent of any model.

A class is loaded when it is first used, so that `names` can be read without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_HOMES = {
    "AgentAttn": "grouped.agent",
    "FullAttn": "full",
    "HierarchicalWindowAttn": "windows.hierarchical",
    "JitteredAttn": "windows.jittered",
    "Method": "base",
    "NeighborhoodAttn": "windows.neighborhood",
    "ProportionalAttn": "proportional",
    "RectifiedSpaAttn": "block_sparse.rectified",
    "SlidingWindowAttn": "windows.sliding",
    "SparseAttn": "block_sparse.sparse",
    "TokenMergingAttn": "grouped.token_merging",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
