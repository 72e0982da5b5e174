"""The block-sparse global attention of VGGT: nearly all of the predicted attention (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.budgets import MassBudget
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import VisualAttention


@dataclass(frozen=True, slots=True, repr=False)
class VGGTAttn(PublishedSparseAttn):
    """Computes the larger of a share of the predicted attention and a share of the blocks.

    "Faster VGGT with Block-Sparse Global Attention" (2025, https://arxiv.org/abs/2509.07120),
    for models that attend over many pictures at once, whose special tokens are text here:
    `VisualAttention`.

    Args:
        mass: Share of the predicted attention among visual tokens that each row computes, 0 to 1.
        keep: Share of the key blocks that each row computes at least, above 0 to 1: the paper
            reports results up to 0.25.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    mass: float = 0.97
    _: KW_ONLY
    keep: float = 0.25
    order: str = "raster"

    def parts(self) -> Parts:
        """The predicted attention, with a floor on the number of blocks."""
        return self.combined(VisualAttention(), self.keep, MassBudget(self.mass, least=self.keep))
