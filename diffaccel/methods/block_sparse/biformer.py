"""BiFormer: regions routed to regions, alike for all heads (2023)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import RegionRouting


@dataclass(frozen=True, slots=True, repr=False)
class BiFormerAttn(PublishedSparseAttn):
    """Computes the regions that are most alike over all heads together.

    "BiFormer: Vision Transformer with Bi-Level Routing Attention" (Zhu et al., 2023,
    https://arxiv.org/abs/2303.08810), whose networks are trained with it, and with a convolution
    beside it; here without either: `RegionRouting` over bricks.

    Args:
        keep: Share of the regions that each computes, above 0 to 1: 4 of 7 x 7 as published.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    keep: float = 4 / 49
    _: KW_ONLY
    order: str = "brick"

    def parts(self) -> Parts:
        """The routing, and a share of each row."""
        return self.combined(RegionRouting(), self.keep)
