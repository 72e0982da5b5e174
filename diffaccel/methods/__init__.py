"""Attention methods: what is computed, independent of any model.

A class is loaded when it is first used, so that `names` can be read without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.methods.base import Method
    from diffaccel.methods.block_sparse.biformer import BiFormerAttn
    from diffaccel.methods.block_sparse.flexprefill import FlexPrefillAttn
    from diffaccel.methods.block_sparse.hip import HiPAttn
    from diffaccel.methods.block_sparse.hyper import HyperAttn
    from diffaccel.methods.block_sparse.moba import MoBAAttn
    from diffaccel.methods.block_sparse.power import PowerAttn
    from diffaccel.methods.block_sparse.radial import RadialAttn
    from diffaccel.methods.block_sparse.rectified import RectifiedSpaAttn
    from diffaccel.methods.block_sparse.sliding_tile import SlidingTileAttn
    from diffaccel.methods.block_sparse.sol import SolAttn
    from diffaccel.methods.block_sparse.sparge import SpargeAttn
    from diffaccel.methods.block_sparse.sparse import SparseAttn
    from diffaccel.methods.block_sparse.sub_block import SubBlockAttn
    from diffaccel.methods.block_sparse.svg import SVGAttn
    from diffaccel.methods.block_sparse.vggt import VGGTAttn
    from diffaccel.methods.block_sparse.vmoba import VMoBAAttn
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
    "BiFormerAttn",
    "FlexPrefillAttn",
    "FullAttn",
    "HiPAttn",
    "HierarchicalWindowAttn",
    "HyperAttn",
    "JitteredAttn",
    "Method",
    "MoBAAttn",
    "NeighborhoodAttn",
    "PowerAttn",
    "ProportionalAttn",
    "RadialAttn",
    "RectifiedSpaAttn",
    "SVGAttn",
    "SlidingTileAttn",
    "SlidingWindowAttn",
    "SolAttn",
    "SpargeAttn",
    "SparseAttn",
    "SubBlockAttn",
    "TokenMergingAttn",
    "VGGTAttn",
    "VMoBAAttn",
]
_HOMES = {
    "AgentAttn": "grouped.agent",
    "BiFormerAttn": "block_sparse.biformer",
    "FlexPrefillAttn": "block_sparse.flexprefill",
    "FullAttn": "full",
    "HiPAttn": "block_sparse.hip",
    "HierarchicalWindowAttn": "windows.hierarchical",
    "HyperAttn": "block_sparse.hyper",
    "JitteredAttn": "windows.jittered",
    "Method": "base",
    "MoBAAttn": "block_sparse.moba",
    "NeighborhoodAttn": "windows.neighborhood",
    "PowerAttn": "block_sparse.power",
    "ProportionalAttn": "proportional",
    "RadialAttn": "block_sparse.radial",
    "RectifiedSpaAttn": "block_sparse.rectified",
    "SVGAttn": "block_sparse.svg",
    "SlidingTileAttn": "block_sparse.sliding_tile",
    "SlidingWindowAttn": "windows.sliding",
    "SolAttn": "block_sparse.sol",
    "SpargeAttn": "block_sparse.sparge",
    "SparseAttn": "block_sparse.sparse",
    "SubBlockAttn": "block_sparse.sub_block",
    "TokenMergingAttn": "grouped.token_merging",
    "VGGTAttn": "block_sparse.vggt",
    "VMoBAAttn": "block_sparse.vmoba",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
