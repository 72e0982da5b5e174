"""FlexPrefill: per head, blocks by their means or columns and diagonals (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import FlexPrefill


@dataclass(frozen=True, slots=True, repr=False)
class FlexPrefillAttn(PublishedSparseAttn):
    """Computes per head the blocks that means predict, or columns and diagonals of blocks.

    "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
    Inference" (Lai et al., 2025, https://arxiv.org/abs/2502.20766), without its causal mask:
    `FlexPrefill`.

    Args:
        mass: Share of the attention of each head that is computed, 0 to 1.
        divergence: Largest difference, at least 0, up to which a head trusts block means.
        least: Tokens that columns, and diagonals, hold at least in every head.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    mass: float = 0.9
    _: KW_ONLY
    divergence: float = 0.1
    least: int = 512
    order: str = "raster"

    def parts(self) -> Parts:
        """The test of each head, with its budget over all rows."""
        return self.combined(FlexPrefill(self.mass, self.divergence, least=self.least))
