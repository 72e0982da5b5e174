"""MoBA: the blocks whose mean key fits best, and the own one (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import BlockGate


@dataclass(frozen=True, slots=True, repr=False)
class MoBAAttn(PublishedSparseAttn):
    """Computes the blocks whose mean key fits the mean query best, and the own one.

    "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025,
    https://arxiv.org/abs/2502.13189), whose models are trained with it; here without training,
    without its causal mask, and for blocks of queries: `BlockGate`.

    Args:
        keep: Share of the key blocks that each row computes, above 0 to 1: 15 of 60 in the
            comparison of VMoBA.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    keep: float = 0.25
    _: KW_ONLY
    order: str = "raster"

    def parts(self) -> Parts:
        """The gate, and a share of each row."""
        return self.combined(BlockGate(), self.keep)
