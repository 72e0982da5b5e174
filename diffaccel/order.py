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

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class TokenOrder:
    """A permutation of the tokens of a grid and its inverse.

    Args:
        grid: (frames, height, width).
        name: "hilbert", "brick" or "raster".
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
            other) or "raster" (as the model has them).
        block: Tokens per block; only "brick" depends on it.

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
    clipped = {tuple(min(s, n) for s, n in zip(size, grid, strict=True)) for size in sizes}
    return min(clipped, key=surface)


def _hilbert(grid: Grid, block: int) -> np.ndarray:
    """A generalised Hilbert curve through a box of any size, all boxes of a level at once.

    The idea is that of the Gilbert curve (Jakub Cerveny, "gilbert: Generalized Hilbert
    space-filling curve for rectangular domains of arbitrary sizes", 2018,
    https://github.com/jakubcerveny/gilbert): a box is split into boxes that the curve enters
    and leaves at touching corners, until each box is a line. Instead of recursing, every round
    here splits all boxes of the list in place, as array operations.
    """
    # A box: corner where the curve enters (3), then three edge vectors (3 x 3). The curve
    # leaves at the far end of the first edge. The longest side comes first.
    sides = sorted(range(3), key=lambda axis: -grid[axis])
    boxes = np.zeros((1, 4, 3), dtype=np.int64)
    for position, axis in enumerate(sides):
        boxes[0, 1 + position, axis] = grid[axis]
    while True:
        size = np.abs(boxes[:, 1:]).sum(-1)
        is_line = (size > 1).sum(1) <= 1
        if is_line.all():
            return _walk_lines(boxes, size, grid)
        boxes = _split(boxes, size, is_line)


def _walk_lines(boxes: np.ndarray, size: np.ndarray, grid: Grid) -> np.ndarray:
    rows = np.arange(len(boxes))
    longest = size.argmax(1)
    steps = size[rows, longest]
    direction = np.sign(boxes[rows, 1 + longest])
    starts = np.cumsum(steps) - steps
    offset = np.arange(steps.sum()) - np.repeat(starts, steps)
    points = np.repeat(boxes[:, 0], steps, 0) + offset[:, None] * np.repeat(direction, steps, 0)
    return np.ravel_multi_index(tuple(points.T), grid).astype(np.int64)


def _split(boxes: np.ndarray, size: np.ndarray, is_line: np.ndarray) -> np.ndarray:
    """Replaces every box by the two, three or five boxes it splits into, in curve order."""
    half = size // 2
    half += (half % 2 == 1) & (size > 2)  # an even half lets the curve leave at the right corner
    unit = np.sign(boxes[:, 1:])
    near = unit * half[..., None]
    a, b, c = size.T
    long_a = (2 * a > 3 * b) & (2 * a > 3 * c)
    long_b = ~long_a & (3 * b > 4 * c)
    long_c = ~long_a & ~long_b & (3 * c > 4 * b)
    cases = (
        (is_line, lambda *box: [box[:4]]),
        (long_a & ~is_line, _split_along_a),
        (long_b & ~is_line, _split_along_b),
        (long_c & ~is_line, _split_along_c),
        (~(long_a | long_b | long_c | is_line), _split_in_five),
    )
    children = np.zeros((len(boxes), 5, 4, 3), dtype=np.int64)
    for chosen, rule in cases:
        if chosen.any():
            parts = rule(
                *boxes[chosen].transpose(1, 0, 2),
                *near[chosen].transpose(1, 0, 2),
                *unit[chosen].transpose(1, 0, 2),
            )
            for position, part in enumerate(parts):
                children[chosen, position] = np.stack(part, 1)
    children = children.reshape(-1, 4, 3)
    return children[np.abs(children[:, 1:]).sum(-1).min(1) > 0]


# The rules take a box (corner p, edges a, b, c), the nearer halves of its edges and their unit
# vectors, and return smaller boxes so that each begins beside the end of the one before.
Box = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Vector = np.ndarray


def _split_along_a(
    p: Vector, a: Vector, b: Vector, c: Vector, a1: Vector, *_: Vector
) -> list[Box]:
    return [(p, a1, b, c), (p + a1, a - a1, b, c)]


def _split_along_b(
    p: Vector, a: Vector, b: Vector, c: Vector,
    a1: Vector, b1: Vector, c1: Vector, ua: Vector, ub: Vector, uc: Vector,
) -> list[Box]:  # fmt: skip
    turn = p + (a - ua) + (b1 - ub)
    return [(p, b1, c, a1), (p + b1, a, b - b1, c), (turn, -b1, c, a1 - a)]


def _split_along_c(
    p: Vector, a: Vector, b: Vector, c: Vector,
    a1: Vector, b1: Vector, c1: Vector, ua: Vector, ub: Vector, uc: Vector,
) -> list[Box]:  # fmt: skip
    turn = p + (a - ua) + (c1 - uc)
    return [(p, c1, a1, b), (p + c1, a, b, c - c1), (turn, -c1, a1 - a, b)]


def _split_in_five(
    p: Vector, a: Vector, b: Vector, c: Vector,
    a1: Vector, b1: Vector, c1: Vector, ua: Vector, ub: Vector, uc: Vector,
) -> list[Box]:  # fmt: skip
    over = p + (b1 - ub) + (c - uc)
    back = p + (a - ua) + b1 + (c - uc)
    home = p + (a - ua) + (b1 - ub)
    return [
        (p, b1, c1, a1),
        (p + b1, c, a1, b - b1),
        (over, a, -b1, c1 - c),
        (back, -c, a1 - a, b - b1),
        (home, -b1, c1, a1 - a),
    ]


ORDERS: dict[str, Callable[[Grid, int], np.ndarray]] = {
    "hilbert": _hilbert,
    "brick": _brick,
    "raster": _raster,
}
