"""Blocks that are kept whatever their score."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffaccel.layout import Grid
from diffaccel.methods.block_sparse.order import first_frame_blocks, neighbor_blocks, token_order

if TYPE_CHECKING:
    from diffaccel.methods.block_sparse.selectors.base import Selector


class ForcedBlocks(NamedTuple):
    """Blocks that are kept whatever their probability.

    Args:
        mask: (NB, NB) bool, or None where nothing is forced.
        largest: The largest count of a row.
        share: Share of all pairs that is forced.
    """

    mask: Tensor | None
    largest: int
    share: float

    def of(self, rows: slice | Tensor) -> Tensor | None:
        """The mask of some query blocks, (R, NB)."""
        return None if self.mask is None else self.mask[rows]

    @property
    def is_everything(self) -> bool:
        """Whether every pair is forced."""
        return self.share == 1.0


@lru_cache(maxsize=32)
def forced_blocks(
    grid: Grid,
    order: str,
    block: int,
    neighbors: bool,
    first_frame: bool,
    selector: Selector,
    device: torch.device,
) -> ForcedBlocks:
    """Collects the blocks that are kept whatever their probability, cached.

    Args:
        grid: (frames, height, width).
        order: Name of the token order.
        block: Tokens per block.
        neighbors: Whether a block keeps the blocks that touch it in the grid.
        first_frame: Whether blocks that hold first-frame tokens keep each other. Ignored for an
            image, where it would keep everything.
        selector: Which may force blocks of its own.
        device: Where the mask goes.
    """
    forced = selector.forced(token_order(grid, order, block))
    if neighbors:
        touching = neighbor_blocks(grid, order, block)
        forced = touching if forced is None else forced | touching
    if first_frame and grid[0] > 1:
        holds = first_frame_blocks(grid, order, block)
        pairs = holds[:, None] & holds[None, :]
        forced = pairs if forced is None else forced | pairs
    if forced is None:
        return ForcedBlocks(None, 0, 0.0)
    largest, share = int(forced.sum(-1).max()), float(forced.double().mean())
    with torch.inference_mode(False):
        return ForcedBlocks(forced.to(device), largest, share)
