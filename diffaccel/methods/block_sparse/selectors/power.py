"""Blocks at distances that are powers of two: PowerAttention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.pattern import Pattern


@dataclass(frozen=True, slots=True)
class PowerDistances(Pattern):
    """Keeps the blocks at distance 0, 1, 2, 4, 8, ... along the order, and the first ones.

    After d layers a token has heard of all tokens within distance 2**d, at about 2 * log2(NB)
    blocks per row. The pattern of "PowerAttention: Exponentially Scaling of Receptive Fields for
    Effective Sparse Attention" (2025, https://arxiv.org/abs/2503.03588), on both sides, since
    attention is not causal here.

    Args:
        window: Blocks next to its own that a block keeps on either side, at least 0.
        sinks: First blocks of the order that all keep, at least 0.
    """

    window: int = 1
    sinks: int = 1

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.window < 0 or self.sinks < 0:
            raise ValueError(
                "window and sinks must be at least 0, got "
                f"window={self.window}, sinks={self.sinks}; they count blocks"
            )

    def pairs(self, order: TokenOrder) -> Tensor:
        place = torch.arange(order.blocks)
        distance = (place[:, None] - place).abs()
        is_power = (distance & (distance - 1)) == 0
        return is_power | (distance <= self.window) | (place < self.sinks)
