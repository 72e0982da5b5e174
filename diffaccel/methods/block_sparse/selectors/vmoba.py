"""The blocks that hold a share of the similarity of a whole head: VMoBA's gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, MassBudget, MixedBudget, RowBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import (
    in_score_order,
    mean_logits,
    without_empty,
)

Ranking = Literal["row", "head", "overall"]


@dataclass(frozen=True, slots=True)
class VideoBlockGate(Selector):
    """Scores a block by the product of mean query and mean key, compared over a set of rows.

    With a threshold, products g become (g - min g) / (max g - min g) over the set, and the fewest
    blocks are kept that have that share of their sum; the own block is kept and counts. That is
    the rule of "VMoBA: Mixture-of-Block Attention for Video Diffusion Models" (2025,
    https://arxiv.org/abs/2506.23858), for blocks of queries (there: single queries). Its
    partition, which changes from layer to layer, is the order "cyclic".

    Args:
        ranking: What is compared: the blocks of one query block ("row"), of all query blocks of a
            head ("head", the paper's: salient queries get more), or of all heads ("overall").
        threshold: Share of the similarity that is kept, 0 to 1: 0.25 keeps about 15 to 20 % of
            the blocks. None leaves the number to the budget.
    """

    ranking: Ranking = "head"
    threshold: float | None = 0.25

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.ranking not in get_args(Ranking):
            raise ValueError(
                f"ranking must be one of {', '.join(get_args(Ranking))}, got "
                f"ranking={self.ranking!r}; choose one"
            )
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(
                f"threshold must lie in 0 to 1, got threshold={self.threshold}; it is the share "
                "of the similarity that is kept, None for a number of blocks"
            )

    @property
    def budget(self) -> Budget:
        """Over the set: the share of the similarity, or as many blocks as are asked for."""
        across_rows, across_heads = self.ranking != "row", self.ranking == "overall"
        if self.threshold is not None:
            return MassBudget(self.threshold, across_rows, across_heads)
        return MixedBudget(0.0, across_heads) if across_rows else RowBudget()

    @property
    def compares_heads(self) -> bool:
        """Where all heads are compared."""
        return self.ranking == "overall"

    def score(self, rows: BlockRows) -> Tensor:
        """Products, as shares of their range where there is a threshold."""
        logits = mean_logits(rows)
        if self.threshold is None:
            return in_score_order(logits, rows)
        if self.ranking == "row":
            low, high = _range(logits, rows)
        else:
            low, high = rows.call.once(self, lambda: self._range_of_all(rows.call))
        scores = (logits - low) / (high - low).clamp_min(1e-6)
        # The least of all is worth nothing, but is a block; and a sample may lack the extremes.
        scores = scores.clamp_(min=1e-6).masked_fill(~logits.isfinite(), torch.nan)
        return without_empty(scores, rows)

    def forced(self, order: TokenOrder) -> Tensor:
        """The own block."""
        return torch.eye(order.blocks, dtype=torch.bool)

    def _range_of_all(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        parts = [_range(mean_logits(rows), rows) for rows in call.rows()]
        low, high = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        axes = (1, 2) if self.ranking == "overall" else (2,)
        return low.amin(axes, keepdim=True), high.amax(axes, keepdim=True)


def _range(logits: Tensor, rows: BlockRows) -> tuple[Tensor, Tensor]:
    """Least and largest of each row, of blocks with tokens: (B, H, R, 1) each."""
    is_out = (rows.call.statistics.counts[:, None, None] == 0) | ~logits.isfinite()
    low = logits.masked_fill(is_out, torch.inf).amin(-1, keepdim=True)
    high = logits.masked_fill(is_out, -torch.inf).amax(-1, keepdim=True)
    return low, high
