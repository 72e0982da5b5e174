"""A pattern or a score of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, PositiveBudget, RowBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.base import Selector


@dataclass(frozen=True, slots=True, eq=False)
class OwnBlocks(Selector):
    """Keeps the blocks of a mask, or scores them by a function.

    Args:
        blocks: (NB, NB), (H, NB, NB) or (B, H, NB, NB): bool, True for what is kept, or numbers
            of at least 0, the larger the better. H and B may be 1. Or a function that takes some
            query blocks (`BlockRows`: their statistics, their tokens, where the call stands) and
            returns their scores, (B, H, R, NB) with B and H possibly 1.

    Example:
        >>> near = (torch.arange(32)[:, None] - torch.arange(32)).abs() <= 4
        >>> output = SparseAttn(selector=OwnBlocks(near)).attend(query, key, value, layout)
    """

    blocks: Tensor | Callable[[BlockRows], Tensor]

    def __post_init__(self) -> None:
        blocks: Any = self.blocks
        if not isinstance(blocks, Tensor):
            if not callable(blocks):
                raise TypeError(
                    "blocks must be a tensor or a function of BlockRows, got "
                    f"{type(blocks).__name__}; pass a mask (NB, NB) of key blocks per query block"
                )
        elif not 2 <= blocks.dim() <= 4 or blocks.shape[-1] != blocks.shape[-2]:
            raise ValueError(
                "blocks must be (NB, NB), (H, NB, NB) or (B, H, NB, NB), got "
                f"{tuple(blocks.shape)}; rows are query blocks, columns key blocks"
            )

    @property
    def budget(self) -> Budget:
        """All of a mask; of other scores a share of each row."""
        is_mask = isinstance(self.blocks, Tensor) and not self.blocks.is_floating_point()
        return PositiveBudget() if is_mask else RowBudget()

    @property
    def compares_heads(self) -> bool:
        """Where ranks that share heads would need to know which are theirs."""
        return not isinstance(self.blocks, Tensor) or self.blocks.dim() > 2

    def score(self, rows: BlockRows) -> Tensor:
        """As given."""
        blocks, call = self.blocks, rows.call
        if isinstance(blocks, Tensor):
            if blocks.shape[-1] != call.number:
                raise ValueError(
                    f"blocks must be a mask of the {call.number} blocks of this call, got "
                    f"{tuple(blocks.shape)}; their number is tokens / block, rounded up"
                )
            found = blocks.to(call.visual.query.device)[..., rows.rows, :]
            found = found[(None,) * (4 - found.dim())]
        else:
            found = blocks(rows)
        batch, heads, count, _ = rows.query_mean.shape
        fits = found.dim() == 4 and found.shape[2:] == (count, call.number)
        if not fits or found.shape[0] not in (1, batch) or found.shape[1] not in (1, heads):
            raise ValueError(
                f"blocks must give scores (B, H, R, NB) = {(batch, heads, count, call.number)}, "
                f"B and H may be 1, got {tuple(found.shape)}"
            )
        return found.float()

    def share(self, order: TokenOrder) -> float | None:
        """That of a mask."""
        if isinstance(self.blocks, Tensor):
            return float((self.blocks > 0).double().mean())
        return None
