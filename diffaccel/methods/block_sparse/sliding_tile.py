"""Sliding tile attention: a window of tiles around the tile of a query (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import SlidingTiles


@dataclass(frozen=True, slots=True, repr=False)
class SlidingTileAttn(PublishedSparseAttn):
    """Computes a window of tiles around the tile of a query.

    "Fast Video Generation with Sliding Tile Attention" (Zhang et al., 2025,
    https://arxiv.org/abs/2502.04507): `SlidingTiles` over bricks, on any grid. There every head
    has a window of its own, found by a search; here all have one. `NeighborhoodAttn` and
    `SlidingWindowAttn` slide by tokens.

    Args:
        window: Frames, rows and columns of the window in tokens, at least 1 each.
        tile: Frames, rows and columns of a tile, (6, 8, 8) as published; None for a brick,
            which is one block.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    window: tuple[int, int, int] = (18, 24, 24)
    _: KW_ONLY
    tile: tuple[int, int, int] | None = None
    order: str = "brick"

    def parts(self) -> Parts:
        """The window as a whole."""
        return self.combined(SlidingTiles(self.window, self.tile))
