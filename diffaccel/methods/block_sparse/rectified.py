"""Rectified sparse attention: compute the most attended blocks, estimate the rest.

"Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation" (2025,
https://arxiv.org/abs/2511.19835).

1. Visual tokens are put along a Hilbert curve, so that `block` consecutive tokens form a compact
   piece of the picture (`diffaccel.methods.block_sparse.order`).
2. Block means of query and key predict how much attention every query block pays to every key
   block and to the text (`diffaccel.methods.block_sparse.estimator`).
3. The blocks with the largest prediction, the neighbours in the grid and all text are computed
   exactly (`diffaccel.methods.block_sparse.selectors`).
4. The others enter as their mean value, weighted by the prediction, and the exact part is scaled
   down by what they got (`diffaccel.methods.block_sparse.correctors`).

Deviations from the authors' code: any grid, text length and batch size (they pad, or demand
multiples of 128, and average padding into the means); padding masks; fp32 statistics (theirs:
16 bit); text mass counts towards `p_remain` first; the first-frame rule uses the true first frame
(theirs: the first blocks of the curve); ties go to the lowest index; scale and bias are applied
inside the attention kernel; tokens are reordered in each layer rather than once per model call.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.budgets import RowBudget
from diffaccel.methods.block_sparse.correctors import (
    CORRECTORS,
    Corrector,
    PooledReallocation,
)
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.selectors import PooledAttention
from diffaccel.methods.published import published

if TYPE_CHECKING:
    from typing_extensions import Self

CORRECTIONS = ("pooled", "centroids")


@dataclass(frozen=True, slots=True, repr=False)
class RectifiedSpaAttn(BlockSparseMethod):
    """Attends to the most relevant key blocks exactly and to the others through their means.

    Lossy: pays where the visual sequence is long (about 8,000 tokens and more). Text queries,
    and visual queries towards text, are exact.

    Args:
        drop: Share of visual key blocks that is not computed, 0 to below 1. 0.8 drops four
            fifths; 0 is dense.
        p_remain: Share of the attention mass that is computed at least, 0 to 1. A row needs
            more than `1 - drop` of the blocks only where its attention is spread out widely.
        neighbors: Whether blocks that touch in the grid are always kept.
        gapr: Whether a dropped block is estimated only where the estimate can be trusted;
            False estimates every dropped block. Of correction="pooled" alone.
        correction: How dropped blocks are estimated. "pooled" is the paper's: all queries of a
            block share one estimate. "centroids" is ours: each query has its own, fitted
            to the normaliser of a few exact rows (`BlockSummaries`), for about `1 / block` of the
            dense cost; it has no `gapr`.
        drop_end: Share at the end of the schedule, as `drop`, which then holds at its start; in
            between it is linear in the share of the schedule that lies behind a step. None:
            `drop` throughout.
        block, order, first_frame, reuse, reuse_passes, hysteresis: As of
            `BlockSparseMethod`.
        dense_steps, dense_layers: As of `ScheduledMethod`.

    Example:
        >>> layout = TokenLayout.image(64, 64, text_before=512)
        >>> output = RectifiedSpaAttn(drop=0.9).attend(query, key, value, layout)
    """

    drop: float = 0.8
    density_knob: ClassVar[str] = "drop"
    _: KW_ONLY
    drop_end: float | None = None
    p_remain: float = 0.3
    neighbors: bool = True
    gapr: bool = True
    correction: str = "pooled"

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("drop", "drop_end"):
            drop = getattr(self, name)
            if drop is not None and not 0.0 <= drop < 1.0:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {name}={drop}; "
                    "0.8 drops four fifths of the key blocks"
                )
        if self.correction not in CORRECTIONS:
            raise ValueError(
                f"correction must be one of {', '.join(CORRECTIONS)}, got "
                f"correction={self.correction!r}"
            )
        BlockSparseMethod.__post_init__(self)

    @classmethod
    def published(cls, family: str) -> Self:
        """The method with the drop rate published for a model family.

        The schedule stays None and is filled when the method is attached (`resolved`), because
        it depends on the number of layers. A family without a published drop rate gets 0.8, and
        0 dense steps and no dense layers.

        Args:
            family: A name from `diffaccel.methods.published.PUBLISHED`, such as "wan2.1-t2v".
        """
        values = published(family)
        return cls() if values.drop is None else cls(drop=values.drop)

    def parts(self) -> Parts:
        """The most attended blocks, and the predicted share of the others as their mean values."""
        corrector: Corrector = PooledReallocation(self.gapr)
        if self.correction == "centroids":
            corrector = CORRECTORS["normaliser"]
        return Parts(PooledAttention(), RowBudget(), corrector, 1.0 - self.drop, self.p_remain)
