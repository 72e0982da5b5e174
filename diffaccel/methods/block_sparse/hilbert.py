"""A generalised Hilbert curve through a box of any size, all boxes of a level at once.

The idea is that of the Gilbert curve (Jakub Cerveny, "gilbert: Generalized Hilbert space-filling
curve for rectangular domains of arbitrary sizes", 2018,
https://github.com/jakubcerveny/gilbert): a box is split into boxes that the curve enters and
leaves at touching corners, until each box is a line. Instead of recursing box by box, every
round here splits all boxes of the list, in place, as array operations: 115,200 cells take about
a tenth of a second.
"""

from __future__ import annotations

import numpy as np

from diffaccel.layout import Grid

Vector = np.ndarray
Vectors = np.ndarray  # several of them, one after the other
Box = tuple[Vector, Vector, Vector, Vector]


def hilbert_curve(grid: Grid) -> np.ndarray:
    """Walks through every cell of a box.

    Args:
        grid: (frames, height, width), any sizes of at least 1.

    Returns:
        (N,) int64, the raster indices of the cells in curve order. Consecutive cells share a
        face in a plane with an even long side; elsewhere a few steps go diagonally.
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
        (is_line, lambda box, near, unit: [box]),
        (long_a & ~is_line, _split_along_a),
        (long_b & ~is_line, _split_along_b),
        (long_c & ~is_line, _split_along_c),
        (~(long_a | long_b | long_c | is_line), _split_in_five),
    )
    children = np.zeros((len(boxes), 5, 4, 3), dtype=np.int64)
    for chosen, rule in cases:
        if chosen.any():
            parts = rule(*(x[chosen].transpose(1, 0, 2) for x in (boxes, near, unit)))
            for position, part in enumerate(parts):
                children[chosen, position] = np.stack(part, 1)
    flat = children.reshape(-1, 4, 3)
    return flat[np.abs(flat[:, 1:]).sum(-1).min(1) > 0]


# The rules take a box (corner p, edges a, b, c), the nearer halves of its edges and their unit
# vectors, and return smaller boxes so that each begins beside the end of the one before.


def _split_along_a(box: Vectors, near: Vectors, unit: Vectors) -> list[Box]:
    (p, a, b, c), (a1, _, _) = box, near
    return [(p, a1, b, c), (p + a1, a - a1, b, c)]


def _split_along_b(box: Vectors, near: Vectors, unit: Vectors) -> list[Box]:
    (p, a, b, c), (a1, b1, _), (ua, ub, _) = box, near, unit
    turn = p + (a - ua) + (b1 - ub)
    return [(p, b1, c, a1), (p + b1, a, b - b1, c), (turn, -b1, c, a1 - a)]


def _split_along_c(box: Vectors, near: Vectors, unit: Vectors) -> list[Box]:
    (p, a, b, c), (a1, _, c1), (ua, _, uc) = box, near, unit
    turn = p + (a - ua) + (c1 - uc)
    return [(p, c1, a1, b), (p + c1, a, b, c - c1), (turn, -c1, a1 - a, b)]


def _split_in_five(box: Vectors, near: Vectors, unit: Vectors) -> list[Box]:
    (p, a, b, c), (a1, b1, c1), (ua, ub, uc) = box, near, unit
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
