"""Plain block-sparse attention: compute the most attended blocks, ignore the rest."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.methods.block_sparse.base import BlockSparseMethod, check_knobs
from diffaccel.methods.block_sparse.correctors import NoCorrection
from diffaccel.methods.block_sparse.selectors import TopBlocks


@dataclass(frozen=True, slots=True)
class SparseAttn(BlockSparseMethod):
    """Attends to the key blocks with the largest pooled attention, and to all text.

    The same selection as `RectifiedSpaAttn` with `drop = 1 - keep`, and nothing done about the
    blocks left out. The knobs that both have mean the same, so that
    `SparseAttn(keep=0.2, p_remain=0.3, neighbors=True)` differs from `RectifiedSpaAttn(drop=0.8)`
    in the correction alone. Own design, a baseline.

    Args:
        keep: Share of visual key blocks that is computed, above 0 to 1; 1 is dense.
        p_remain: Share of the attention mass that is computed at least; 0 leaves `keep` alone.
        block: Tokens per block, a power of two of at least 16.
        order: "hilbert", "brick" or "raster": which tokens form a block.
        neighbors: Whether blocks that touch in the grid are always kept.
        first_frame: Whether blocks with first-frame tokens always keep each other (video only).
            None: as published for the model family, False without a model.
        dense_steps: First denoising steps that run dense. None: as published, 0 without a model.
        dense_layers: Layers that run dense: a tuple of indices, or the number of first layers.
            None: as published, none without a model.
    """

    keep: float = 0.25
    p_remain: float = 0.0
    block: int = 128
    order: str = "hilbert"
    neighbors: bool = False
    first_frame: bool | None = None
    dense_steps: int | None = None
    dense_layers: tuple[int, ...] | int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"keep must lie above 0 and be at most 1, got keep={self.keep}; "
                "0.25 computes a quarter of the key blocks"
            )
        check_knobs(self)

    def selector(self) -> TopBlocks:
        """The blocks with the largest predicted attention."""
        return TopBlocks(self.keep, self.p_remain)

    def corrector(self) -> NoCorrection:
        """None."""
        return NoCorrection()
