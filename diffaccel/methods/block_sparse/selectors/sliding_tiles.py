"""A window of tiles around the tile of a query: sliding tile attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.layout import Grid
from diffaccel.methods.block_sparse.order import TokenOrder, brick_size
from diffaccel.methods.block_sparse.selectors.pattern import Pattern, token_places


@dataclass(frozen=True, slots=True)
class SlidingTiles(Pattern):
    """Keeps the blocks that hold tokens of a window of tiles around those of the query block.

    The grid is cut into tiles; all queries of a tile see a window of whole tiles, which is moved
    inward at borders. "Fast Video Generation with Sliding Tile Attention" (Zhang et al., 2025,
    https://arxiv.org/abs/2502.04507). Where tiles are blocks (order "brick"), none is computed in
    part; others are computed whole.

    Args:
        window: Frames, rows and columns of the window in tokens, at least 1 each; rounded to an
            odd number of tiles. (18, 24, 24) is published for HunyuanVideo, three tiles a side.
        tile: Frames, rows and columns of a tile in tokens, (6, 8, 8) as published; None for the
            bricks of the order, which are small enough for one block.
    """

    window: tuple[int, int, int] = (18, 24, 24)
    tile: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("window", "tile"):
            sides: Any = getattr(self, name)
            if sides is None:
                continue
            object.__setattr__(self, name, tuple(sides))  # a list could not be a cache key
            if len(sides) != 3 or not all(isinstance(x, int) and x >= 1 for x in sides):
                raise ValueError(
                    f"{name} must be three integers (frames, rows, columns) of at least 1, got "
                    f"{name}={sides!r}; it counts tokens"
                )

    def pairs(self, order: TokenOrder) -> Tensor:
        tile: Grid = self.tile or brick_size(order.grid, order.block)
        holds, sees = [], []
        for place, length, side, window in zip(
            token_places(order), order.grid, tile, self.window, strict=True
        ):
            tiles = -(-length // side)
            radius = max(0, round((window / side - 1) / 2))
            of_tile = torch.arange(tiles)
            center = of_tile.clamp(radius, max(radius, tiles - 1 - radius))
            sees.append((center[:, None] - of_tile).abs() <= radius)
            holds.append(place // side)
        sides = [len(x) for x in sees]
        cell = (holds[0] * sides[1] + holds[1]) * sides[2] + holds[2]
        is_held = torch.zeros(order.blocks, sides[0] * sides[1] * sides[2])
        is_held.scatter_(1, cell, 1.0)
        seen = is_held.unflatten(1, sides)
        seen = torch.einsum("ntyx,tu,yv,xw->nuvw", seen, *(x.float() for x in sees)).flatten(1)
        return (seen @ is_held.mT) > 0
