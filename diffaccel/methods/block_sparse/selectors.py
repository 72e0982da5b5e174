"""Selectors: which key blocks a query block computes exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import block_lists
from diffaccel.kernels.block_selection.call import SelectionCall
from diffaccel.kernels.block_selection.op import select
from diffaccel.layout import Grid
from diffaccel.methods.block_sparse.order import first_frame_blocks, neighbor_blocks

__all__ = ["ForcedBlocks", "TopBlocks", "block_lists", "forced_blocks"]


@dataclass(frozen=True, slots=True)
class TopBlocks:
    """Keeps the blocks with the largest predicted attention.

    Per row (batch, head, query block): the first `n` blocks in descending order, where `n` is
    the larger of `top_k = int(keep * NB)` (at least 1) and the number of blocks that it takes
    to exceed the mass `p_remain`. Text is always computed, so its mass counts first. Ties go to
    the lowest block index, so that the choice is deterministic.

    Args:
        keep: Share of the NB key blocks, 0 to 1.
        p_remain: Share of the attention mass that must be computed, 0 to 1; 0 leaves `keep`
            alone in charge.
    """

    keep: float
    p_remain: float = 0.0

    def top_k(self, blocks: int) -> int:
        """Number of blocks that `keep` alone asks for, out of `blocks`."""
        # (1 - 0.8) * 10 is 1.9999999999999996 in floating point and means 2.
        return min(blocks, max(1, int(self.keep * blocks + 1e-6)))

    def max_count(self, blocks: int, forced: int) -> int:
        """Upper bound of the number of kept blocks, known without looking at the data."""
        return blocks if self.p_remain > 0 else min(blocks, self.top_k(blocks) + forced)

    def select(self, probability: Tensor, forced: Tensor | None = None) -> Tensor:
        """Chooses blocks.

        Args:
            probability: (B, H, R, NB + 1) fp32 from `block_attention`, the last entry is text.
            forced: (R, NB) bool, blocks that are kept whatever their probability, or None.

        Returns:
            (B, H, R, NB) bool. Blocks of probability 0 (fully padded) are left out.
        """
        return self.lists(probability, forced)[2]

    def lists(
        self, probability: Tensor, forced: Tensor | None = None, max_count: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses blocks and lists them.

        Args:
            probability: (B, H, R, NB + 1) fp32, as for `select`.
            forced: (R, NB) bool, as for `select`.
            max_count: Width of the lists from `max_count`, or None for one that is always enough.

        Returns:
            indices (B, H, R, max_count) int32, ascending, and counts (B, H, R) int32, as
            `block_sparse_attention` takes them; kept (B, H, R, NB) bool, what `select` returns.
        """
        visual, text = probability[..., :-1], probability[..., -1]
        top_k = self.top_k(visual.shape[-1])
        call = SelectionCall(visual, top_k, self.p_remain, text, forced, max_count, True)
        indices, counts, kept = select(call)
        return indices, counts, kept


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
        device: Where the mask goes.
    """
    forced = None
    if neighbors:
        forced = neighbor_blocks(grid, order, block)
    if first_frame and grid[0] > 1:
        holds = first_frame_blocks(grid, order, block)
        pairs = holds[:, None] & holds[None, :]
        forced = pairs if forced is None else forced | pairs
    if forced is None:
        return ForcedBlocks(None, 0, 0.0)
    largest, share = int(forced.sum(-1).max()), float(forced.double().mean())
    with torch.inference_mode(False):
        return ForcedBlocks(forced.to(device), largest, share)
