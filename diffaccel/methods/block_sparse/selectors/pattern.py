"""What selectors share that look at the grid alone: a fixed pattern of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, PositiveBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import without_empty


@dataclass(frozen=True, slots=True)
class Pattern(Selector):
    """Keeps the same blocks for all samples and heads, whatever their tokens hold.

    A subclass implements `pairs`, which is computed once per grid and order.
    """

    @property
    def budget(self) -> Budget:
        """All blocks of the pattern."""
        return PositiveBudget()

    def pairs(self, order: TokenOrder) -> Tensor:
        """Says which key blocks each query block keeps: (NB, NB) bool or fp32 scores, on the CPU.

        Every block keeps its own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement pairs")

    def score(self, rows: BlockRows) -> Tensor:
        """Scores of the pattern, of each sample: (B or 1, 1, R, NB)."""
        order = rows.call.order
        pairs = _pairs_on(self, order, order.order.device)[rows.rows]
        samples = len(rows.call.statistics.counts)
        return without_empty(pairs.expand(samples, 1, -1, -1).clone(), rows)

    def share(self, order: TokenOrder) -> float:
        """Share of the blocks in the pattern."""
        return float((_pairs_on(self, order, torch.device("cpu")) > 0).double().mean())


@lru_cache(maxsize=64)
def _pairs_on(pattern: Pattern, order: TokenOrder, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return pattern.pairs(order.to("cpu")).float().to(device)


def token_places(order: TokenOrder, samples: int | None = None) -> tuple[Tensor, ...]:
    """Says where in the grid tokens of each block lie.

    Args:
        order: Tokens of the blocks.
        samples: How many tokens of each block, spread evenly; None for all. Those of the last
            block may repeat.

    Returns:
        frames, rows and columns, each (NB, samples) int64 on the CPU.
    """
    _, height, width = order.grid
    raster, block = order.order.cpu(), order.block
    samples = min(block, samples or block)
    start = torch.arange(order.blocks)[:, None] * block
    size = (len(raster) - start).clamp(max=block)
    spread = torch.arange(samples, dtype=torch.float64) + 0.5
    token = raster[start + (spread * size / samples).long()]
    return token // (height * width), token // width % height, token % width
