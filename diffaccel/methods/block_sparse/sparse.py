"""Plain block-sparse attention: compute the most attended blocks, ignore the rest."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.correctors import NoCorrection
from diffaccel.methods.block_sparse.selectors import TopBlocks


@dataclass(frozen=True, slots=True, repr=False)
class SparseAttn(BlockSparseMethod):
    """Attends to the key blocks with the largest pooled attention, and to all text.

    The same selection as `RectifiedSpaAttn` with `drop = 1 - keep`, and nothing done about the
    blocks left out. The knobs that both have mean the same, so that
    `SparseAttn(keep=0.2, p_remain=0.3, neighbors=True)` differs from `RectifiedSpaAttn(drop=0.8)`
    in the correction alone. Own design, a baseline.

    Args:
        keep: Share of visual key blocks that is computed, above 0 to 1; 1 is dense.
        p_remain, block, order, neighbors, first_frame: As of `BlockSparseMethod`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"keep must lie above 0 and be at most 1, got keep={self.keep}; "
                "0.25 computes a quarter of the key blocks"
            )
        BlockSparseMethod.__post_init__(self)

    def selector(self) -> TopBlocks:
        """The blocks with the largest predicted attention."""
        return TopBlocks(self.keep, self.p_remain)

    def corrector(self) -> NoCorrection:
        return NoCorrection()
