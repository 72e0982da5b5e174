"""Token orders: how a grid of visual tokens becomes a line cut into compact blocks.

A block is a run of `block` consecutive tokens of the order. The better an order keeps grid
neighbours together, the more alike the tokens of a block are, and the more a block mean says
about them. No order pads: only the last block is ragged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.layout import Grid
from diffaccel.methods.block_sparse.hilbert import hilbert_curve
from diffaccel.methods.inputs import VisualTokens


@dataclass(frozen=True, slots=True, eq=False)
class TokenOrder:
    """A permutation of the tokens of a grid and its inverse.

    Args:
        grid: (frames, height, width).
        name: A key of `ORDERS`.
        block: Tokens per block.
        order: (N,) int64; `order[i]` is the raster index of the token at position i.
        inverse: (N,) int64; `inverse[raster index]` is the position of that token.
    """

    grid: Grid
    name: str
    block: int
    order: Tensor
    inverse: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks, the last one possibly ragged."""
        return -(-self.order.numel() // self.block)

    def to(self, device: torch.device | str) -> TokenOrder:
        """The same order on another device, cached."""
        device = torch.device(device)
        if device == self.order.device:
            return self
        return _order_on_device(self.grid, self.name, self.block, device)


@lru_cache(maxsize=32)
def token_order(grid: Grid, order: str, block: int) -> TokenOrder:
    """Orders the tokens of a grid.

    Args:
        grid: (frames, height, width), raster order with width fastest.
        order: "hilbert" (generalised Hilbert curve), "brick" (small boxes one after the
            other), "columns" (small patches through all frames; columns of an image) or "raster"
            (as the model has them).
        block: Tokens per block; only "brick" and "columns" depend on it.

    Returns:
        The order on the CPU; `.to(device)` moves it.
    """
    raster = ORDERS[order](grid, block)
    inverse = np.empty_like(raster)
    inverse[raster] = np.arange(raster.size)
    # A cached inference tensor would break a later call that records gradients.
    with torch.inference_mode(False):
        return TokenOrder(grid, order, block, torch.from_numpy(raster), torch.from_numpy(inverse))


@lru_cache(maxsize=32)
def _order_on_device(grid: Grid, name: str, block: int, device: torch.device) -> TokenOrder:
    source = token_order(grid, name, block)
    with torch.inference_mode(False):
        moved = source.order.to(device), source.inverse.to(device)
    return TokenOrder(grid, name, block, *moved)


@lru_cache(maxsize=32)
def neighbor_blocks(grid: Grid, order: str, block: int) -> Tensor:
    """Says which blocks touch: some tokens of theirs are equal or adjacent, also diagonally.

    Returns:
        (NB, NB) bool on the CPU, symmetric, with a true diagonal.
    """
    tokens = token_order(grid, order, block)
    count = tokens.blocks
    block_of = (tokens.inverse.numpy() // block).reshape(grid)
    touch = np.zeros((count, count), dtype=bool)
    np.fill_diagonal(touch, True)
    for shift in itertools.product((-1, 0, 1), repeat=3):
        if shift <= (0, 0, 0):
            continue  # the opposite shift finds the same pairs
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, grid, strict=True))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, grid, strict=True))
        touch[block_of[here].ravel(), block_of[there].ravel()] = True
    with torch.inference_mode(False):
        return torch.from_numpy(touch | touch.T)


@lru_cache(maxsize=32)
def first_frame_blocks(grid: Grid, order: str, block: int) -> Tensor:
    """Says which blocks hold a token of the first frame: (NB,) bool on the CPU."""
    tokens = token_order(grid, order, block)
    holds = np.zeros(tokens.blocks, dtype=bool)
    holds[tokens.inverse.numpy()[: grid[1] * grid[2]] // block] = True
    with torch.inference_mode(False):
        return torch.from_numpy(holds)


def _raster(grid: Grid, block: int) -> np.ndarray:
    return np.arange(grid[0] * grid[1] * grid[2], dtype=np.int64)


def _brick(grid: Grid, block: int) -> np.ndarray:
    """Bricks in serpentine order, so that a run which leaves one brick enters the next."""
    size = brick_size(grid, block)
    coordinates = np.indices(grid, dtype=np.int64).reshape(3, -1)
    key = np.zeros(coordinates.shape[1], dtype=np.int64)
    reverse = np.zeros_like(key)
    for axis in range(3):
        bricks = -(-grid[axis] // size[axis])
        at = coordinates[axis] // size[axis]
        at = np.where(reverse % 2 == 1, bricks - 1 - at, at)
        key = key * bricks + at
        reverse = reverse + at
    for axis in range(3):
        key = key * size[axis] + coordinates[axis] % size[axis]
    return np.argsort(key, kind="stable")


def _columns(grid: Grid, block: int) -> np.ndarray:
    """Patches of about `block / frames` places, each through all frames; columns of an image."""
    frames, height, width = grid
    places = np.arange(height * width, dtype=np.int64)
    if frames == 1:
        return places.reshape(height, width).T.ravel()
    patch = 1 << max(0, (block // frames).bit_length() - 1)
    places = _brick((1, height, width), patch)
    return (places[:, None] + np.arange(frames) * (height * width)).ravel()


@lru_cache(maxsize=128)
def brick_size(grid: Grid, block: int) -> Grid:
    """Chooses the brick (frames, height, width) of about `block` tokens for a grid.

    Among the factorisations of `block` into three sides that fit the grid, takes the one with
    the smallest total surface over all bricks, incomplete ones at the border included: near a
    cube (a square for an image), and dividing the grid where possible.
    """

    def surface(size: Grid) -> tuple[int, Grid]:
        bricks = 1
        for side, length in zip(size, grid, strict=True):
            bricks *= -(-length // side)
        frames, height, width = size
        return bricks * (frames * height + height * width + frames * width), size

    divisors = [side for side in range(1, block + 1) if block % side == 0]
    sizes = [
        (frames, height, block // (frames * height))
        for frames, height in itertools.product(divisors, repeat=2)
        if block % (frames * height) == 0
    ]
    clipped: set[Any] = {tuple(map(min, size, grid)) for size in sizes}
    return min(clipped, key=surface)


def _hilbert(grid: Grid, block: int) -> np.ndarray:
    return hilbert_curve(grid)


ORDERS: dict[str, Callable[[Grid, int], np.ndarray]] = {
    "columns": _columns,
    "hilbert": _hilbert,
    "brick": _brick,
    "raster": _raster,
}
CYCLES: dict[str, tuple[str, ...]] = {"cyclic": ("raster", "columns", "brick")}
"""Orders that change from layer to layer: "cyclic" cuts time, then the plane, then both."""


def orders_named(name: str) -> tuple[str, ...]:
    """The keys of `ORDERS` that the layers of a method with this order have in turn."""
    return CYCLES.get(name, (name,))


def in_order(visual: VisualTokens, order: TokenOrder) -> VisualTokens:
    """Copies visual tokens from raster order into block order, contiguous."""
    valid = visual.valid
    if valid is not None:
        valid = valid.index_select(1, order.order)
    query, key = into_order(visual.query, order), into_order(visual.key, order)
    value = into_order(visual.value, order)
    return VisualTokens(query, key, value, valid, visual.layout, visual.scale)


def into_order(tokens: Tensor, order: TokenOrder) -> Tensor:
    """Copies (B, N, H, D) tokens from raster order into block order, contiguous."""
    if order.name == "raster":
        return tokens
    # Scattering rows into fresh memory is faster on a CPU than gathering them.
    ordered = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    return ordered.index_copy_(1, order.inverse, tokens)
