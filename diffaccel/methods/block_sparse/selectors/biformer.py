"""Regions routed to regions, alike for all heads: BiFormer's routing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import in_score_order, mean_logits


@dataclass(frozen=True, slots=True)
class RegionRouting(Selector):
    """Scores a block by the product of mean query and mean key over the channels of all heads.

    All heads keep the same blocks. The routing of "BiFormer: Vision Transformer with Bi-Level
    Routing Attention" (Zhu et al., 2023, https://arxiv.org/abs/2303.08810), whose networks are
    trained with it; its regions are squares, here the blocks of any order.
    """

    @property
    def compares_heads(self) -> bool:
        """All of them choose together."""
        return True

    def score(self, rows: BlockRows) -> Tensor:
        """In the order of the products: (B, 1, R, NB)."""
        return in_score_order(mean_logits(rows).sum(1, keepdim=True), rows)
