"""The blocks whose proxy score stands out from those of the other blocks: Sol-Attn's rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, PositiveBudget, RowBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import in_score_order, without_empty


@dataclass(frozen=True, slots=True)
class ProxyDeviations(Selector):
    """Scores a block by how many standard deviations its logit lies above the mean of all blocks.

    With q the mean query of a block, k_m the mean keys, and mean and variance over the blocks m:

        z_nm = q_n . (k_m - mean(k)) / sqrt(sum_d(q_nd**2 * var(k_d)))

    Blocks above `tau` are kept, and the diagonal with its neighbours. The rule of "Sol-Attn"
    (2026, https://arxiv.org/abs/2607.24027), whose other sinks are the text, which is always
    exact here.

    Args:
        tau: Deviations above which a block is kept; 1 keeps 16 % if logits are normally
            distributed. None leaves the number to a budget: the largest z come first.
        diagonal: How many blocks next to its own in the order a block always keeps, at least 0
            on either side; -1 for not even its own.
        sinks: First blocks of the order that all keep and that keep all, at least 0.
    """

    tau: float | None = 1.0
    diagonal: int = 1
    sinks: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.tau is not None and not isfinite(self.tau):
            raise ValueError(f"tau must be finite or None, got tau={self.tau}; 1 is published")
        if self.diagonal < -1 or self.sinks < 0:
            raise ValueError(
                "diagonal must be at least -1 and sinks at least 0, got "
                f"diagonal={self.diagonal}, sinks={self.sinks}; 1 and 0 are the published rule"
            )

    @property
    def budget(self) -> Budget:
        """All that are above `tau`; without it a share of each row."""
        return RowBudget() if self.tau is None else PositiveBudget()

    def score(self, rows: BlockRows) -> Tensor:
        """Deviations, less `tau` where there is one."""
        statistics = rows.call.statistics
        is_block = (statistics.counts > 0).float()[:, None, :, None]
        number = is_block.sum(2, keepdim=True).clamp_min(1.0)
        keys = statistics.key_mean
        keys = (keys - (keys * is_block).sum(2, keepdim=True) / number) * is_block
        variance = keys.square().sum(2, keepdim=True) / number
        query = rows.query_mean
        sigma = (query.square() * variance).sum(-1, keepdim=True).sqrt().clamp_min(1e-30)
        deviations = query @ keys.mT / sigma
        if self.tau is None:
            return in_score_order(deviations, rows)
        return without_empty((deviations - self.tau).clamp_(min=0.0), rows)

    def forced(self, order: TokenOrder) -> Tensor | None:
        """Diagonal and sinks."""
        if self.diagonal < 0 and not self.sinks:
            return None
        place = torch.arange(order.blocks)
        kept = (place[:, None] - place).abs() <= self.diagonal
        is_sink = place < self.sinks
        return kept | is_sink | is_sink[:, None]

    def share(self, order: TokenOrder) -> float | None:
        """That of normally distributed logits."""
        return None if self.tau is None else 1.0 - _normal_share(self.tau)


def _normal_share(deviations: float) -> float:
    return float(torch.special.ndtr(torch.tensor(deviations, dtype=torch.float64)))
