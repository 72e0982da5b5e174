"""The blocks whose mean key fits a query best: MoBA's gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import in_score_order, mean_logits


@dataclass(frozen=True, slots=True)
class BlockGate(Selector):
    """Scores a block by the product of mean query and mean key; the own block is always kept.

    The gate of "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025,
    https://arxiv.org/abs/2502.13189), without its causal mask and for blocks of queries: the
    paper gates every query by itself.

    Args:
        own_block: Whether a query block always keeps the key block of the same tokens.
    """

    own_block: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)

    def score(self, rows: BlockRows) -> Tensor:
        """In the order of the products."""
        return in_score_order(mean_logits(rows), rows)

    def forced(self, order: TokenOrder) -> Tensor | None:
        """The own block."""
        return torch.eye(order.blocks, dtype=torch.bool) if self.own_block else None
