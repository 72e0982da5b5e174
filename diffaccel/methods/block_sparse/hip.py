"""HiP: blocks found by halving the best chunks of the sequence (2024)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.base import DenseLayers
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import TreeSearch


@dataclass(frozen=True, slots=True, repr=False)
class HiPAttn(PublishedSparseAttn):
    """Computes a number of keys for each query block, found by a tree search.

    "HiP: A Training-free Sub-quadratic Cost Transformer Model Serving Framework with
    Hierarchically Pruned Attention" (Lee et al., 2024, https://arxiv.org/abs/2406.09827), with
    the sizes of its successor InfiniteHiP: `TreeSearch`. Up to `tokens` keys it is dense.

    Args:
        tokens: Keys that each query block keeps, at least 1.
        sink: First tokens that all keep, at least 0.
        window: Tokens around its own that a block keeps, at least 0.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`; by default the first
            4 layers are dense, as published (there the last one too).
    """

    tokens: int = 2048
    _: KW_ONLY
    sink: int = 256
    window: int = 1024
    block: int = 64
    order: str = "raster"
    dense_layers: DenseLayers = 4

    def parts(self) -> Parts:
        """All that the search finds."""
        return self.combined(TreeSearch(self.tokens, self.sink, self.window))
