"""Selectors: which key blocks a query block computes exactly."""

from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.biformer import RegionRouting
from diffaccel.methods.block_sparse.selectors.expected_error import ExpectedError
from diffaccel.methods.block_sparse.selectors.flexprefill import FlexPrefill
from diffaccel.methods.block_sparse.selectors.hip import TreeSearch
from diffaccel.methods.block_sparse.selectors.hyper import HashedBuckets
from diffaccel.methods.block_sparse.selectors.moba import BlockGate
from diffaccel.methods.block_sparse.selectors.own import OwnBlocks
from diffaccel.methods.block_sparse.selectors.pooled import PooledAttention
from diffaccel.methods.block_sparse.selectors.power import PowerDistances
from diffaccel.methods.block_sparse.selectors.radial import RadialWindows
from diffaccel.methods.block_sparse.selectors.sliding_tiles import SlidingTiles
from diffaccel.methods.block_sparse.selectors.sparge import SelfSimilarity
from diffaccel.methods.block_sparse.selectors.subblock import SubBlocks
from diffaccel.methods.block_sparse.selectors.svg import SpatialTemporal
from diffaccel.methods.block_sparse.selectors.tau import ProxyDeviations
from diffaccel.methods.block_sparse.selectors.vggt import VisualAttention
from diffaccel.methods.block_sparse.selectors.vmoba import VideoBlockGate

SELECTORS: dict[str, type[Selector]] = {
    "expected-error": ExpectedError,
    "pooled": PooledAttention,
    "visual": VisualAttention,
    "sub-blocks": SubBlocks,
    "tau": ProxyDeviations,
    "moba": BlockGate,
    "vmoba": VideoBlockGate,
    "regions": RegionRouting,
    "flexprefill": FlexPrefill,
    "self-similarity": SelfSimilarity,
    "tree": TreeSearch,
    "hash": HashedBuckets,
    "power": PowerDistances,
    "radial": RadialWindows,
    "tiles": SlidingTiles,
    "spatial-temporal": SpatialTemporal,
}
"""Name -> class, for knobs that are text."""

__all__ = [
    "SELECTORS",
    "BlockGate",
    "ExpectedError",
    "FlexPrefill",
    "HashedBuckets",
    "OwnBlocks",
    "PooledAttention",
    "PowerDistances",
    "ProxyDeviations",
    "RadialWindows",
    "RegionRouting",
    "Selector",
    "SelfSimilarity",
    "SlidingTiles",
    "SpatialTemporal",
    "SubBlocks",
    "TreeSearch",
    "VideoBlockGate",
    "VisualAttention",
]
