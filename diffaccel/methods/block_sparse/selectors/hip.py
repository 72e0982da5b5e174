"""Blocks found by halving the best chunks of the sequence: HiP's tree search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, PositiveBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.representatives import at_tokens, representatives
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import rising


@dataclass(frozen=True, slots=True)
class TreeSearch(Selector):
    """Searches a tree: of 2 k chunks of the keys keeps the k best, halves them, and so on.

    A chunk is judged by one key, the one in its middle, and the mean query; a search ends at
    blocks, k of which are kept. "HiP: A Training-free Sub-quadratic Cost Transformer Model
    Serving Framework with Hierarchically Pruned Attention" (Lee et al., 2024,
    https://arxiv.org/abs/2406.09827), with the sizes of InfiniteHiP (2025,
    https://arxiv.org/abs/2502.08910). Its saving is in the estimate, which is small at the
    lengths of pictures.

    Args:
        tokens: Keys that each query block keeps, at least 1: k is this number in blocks.
        sink: First tokens that all keep, at least 0.
        window: Tokens around its own block that a block keeps, both sides together, at least 0.
    """

    tokens: int = 2048
    sink: int = 256
    window: int = 1024

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.tokens < 1 or self.sink < 0 or self.window < 0:
            raise ValueError(
                "tokens must be at least 1, sink and window at least 0, got "
                f"tokens={self.tokens}, sink={self.sink}, window={self.window}; they count keys"
            )

    @property
    def budget(self) -> Budget:
        """All that the search finds."""
        return PositiveBudget()

    def score(self, rows: BlockRows) -> Tensor:
        """In the order of the products with the blocks' representatives; 0 for what was pruned."""
        call, top_k = rows.call, self._top_k(rows.call.block)
        size = 1
        while -(-call.number // size) > 2 * top_k:
            size *= 2
        alive: Tensor | None = None
        while True:
            logits = rows.query_mean @ self._keys(call, size).mT  # (B, H, R, chunks)
            worth = rising(logits).masked_fill_(_is_empty(call, size), 0.0)
            if alive is not None:
                worth = worth.masked_fill(~alive, 0.0)
            best = worth.topk(min(top_k, worth.shape[-1]), -1).indices
            alive = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
            if size == 1:
                return worth.masked_fill(~alive, 0.0)
            size //= 2
            alive = alive.repeat_interleave(2, -1)[..., : -(-call.number // size)]

    def forced(self, order: TokenOrder) -> Tensor:
        """Window and sink."""
        place = torch.arange(order.blocks)
        apart = (place[:, None] - place).abs() * order.block
        return (apart <= self.window // 2) | (place * order.block < self.sink)

    def share(self, order: TokenOrder) -> float:
        """Blocks of a search."""
        return min(1.0, self._top_k(order.block) / order.blocks)

    def _top_k(self, block: int) -> int:
        return max(1, self.tokens // block)

    def _keys(self, call: BlockCall, size: int) -> Tensor:
        def find() -> Tensor:
            return at_tokens(call.visual.key, representatives(call, size * call.block))

        return call.once((self, size), find)


def _is_empty(call: BlockCall, size: int) -> Tensor:
    """Which chunks of `size` blocks have no real token: (B or 1, 1, 1, chunks)."""
    counts = call.statistics.counts
    counts = torch.nn.functional.pad(counts, (0, -counts.shape[-1] % size))
    return counts.unflatten(-1, (-1, size)).sum(-1)[:, None, None] == 0
