"""PowerAttention: blocks at distances that are powers of two (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import PowerDistances


@dataclass(frozen=True, slots=True, repr=False)
class PowerAttn(PublishedSparseAttn):
    """Computes the blocks at distances that are powers of two along the order.

    "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention"
    (2025, https://arxiv.org/abs/2503.03588), without its causal mask: `PowerDistances`.

    Args:
        window: Blocks on either side of its own that a block keeps, at least 0.
        sinks: First blocks that all keep, at least 0.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    window: int = 1
    _: KW_ONLY
    sinks: int = 1
    order: str = "raster"

    def parts(self) -> Parts:
        """The pattern as a whole."""
        return self.combined(PowerDistances(self.window, self.sinks))
