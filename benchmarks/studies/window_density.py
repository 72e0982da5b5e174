"""Which share of attention is computed for windows, by the order of the tokens.

A window of FreeSwim (Wu et al., 2025, https://arxiv.org/abs/2511.14712) lets a fifth of all pairs
through at 1920x1088, but a block of 128 tokens in the model's own order is a strip of a row, whose
windows together reach across the picture: kernels that work on such blocks compute half of all
pairs. Compact blocks compute little more than the windows. No tensor of attention is made:

    python benchmarks/studies/window_density.py --csv benchmarks/results/window-density.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

import numpy as np
import torch

from diffaccel.benchmarks.rows import Column, table, write_rows
from diffaccel.kernels import WindowAxis, seen_share
from diffaccel.kernels.neighborhood.launch import box_config
from diffaccel.kernels.neighborhood.windows import visited_along, window
from diffaccel.layout import Grid, Segment, TokenLayout
from diffaccel.methods import SlidingWindowAttn
from diffaccel.methods.block_sparse.order import token_order

BLOCK = 128
H100 = (9, 0)


@dataclass(frozen=True, slots=True)
class Case:
    """A model at a size, with what was computed for its published code.

    Args:
        name: Model and size.
        grid: (frames, height, width) in tokens of 16 x 16 pixels and 4 frames.
        native: The same of what the model was trained on.
        exact: Share of the pairs inside the windows.
        raster: Share in blocks of 128 x 128 in the model's order, as shipped.
        tiles: Share in blocks of 4 x 4 tokens with their frames, the best of several.
    """

    name: str
    grid: Grid
    native: Grid
    exact: float
    raster: float
    tiles: float

    @property
    def axes(self) -> tuple[WindowAxis, ...]:
        """The window of native size."""
        layout = TokenLayout((Segment("visual", prod(self.grid), self.grid),), self.native)
        return SlidingWindowAttn().axes(layout)


SMALL, LARGE = (21, 30, 52), (21, 45, 80)
CASES = (
    Case("wan2.1-1.3b 1920x1088", (21, 68, 120), SMALL, 0.201, 0.482, 0.255),
    Case("wan2.1-1.3b 2880x1632", (21, 102, 180), SMALL, 0.090, 0.314, 0.115),
    Case("wan2.1-1.3b 3840x2176", (21, 136, 240), SMALL, 0.050, 0.231, 0.065),
    Case("wan2.1-14b 1920x1088", (21, 68, 120), LARGE, 0.447, 0.683, 0.521),
    Case("wan2.1-14b 3840x2176", (21, 136, 240), LARGE, 0.112, 0.333, 0.133),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One case: shares of all pairs, and how many times less than raster our kernel computes."""

    key = ("case",)

    case: str
    tokens: int
    window: str
    exact: float
    raster_blocks: float
    brick_blocks: float
    hilbert_blocks: float
    kernel_boxes: float
    published_exact: float
    published_raster: float
    published_tiles: float
    saving: float
    published_saving: float


def visited_in_blocks(axes: tuple[WindowAxis, ...], order: str, block: int = BLOCK) -> float:
    """Share of the pairs in the key blocks that hold a key which a query block sees.

    Args:
        axes: The window; its first axis, the frames, is dense.
        order: Name of a token order.
        block: Tokens per block of queries and of keys.
    """
    grid = tuple(axis.length for axis in axes)
    if not axes[0].is_dense:
        raise ValueError(f"the axis of frames must be dense, got {axes[0]}")
    tokens = token_order(grid, order, block)
    place = tokens.order.numpy() % (grid[1] * grid[2])  # frames see alike
    starts = np.arange(0, len(place), block)
    sizes = np.diff(np.append(starts, len(place)))
    known: dict[bytes, int] = {}
    visited = 0
    for start, size in zip(starts, sizes, strict=True):
        queries = np.unique(place[start : start + size])
        if queries.tobytes() not in known:
            seen = _seen(axes[1:], queries)[place]
            blocks = np.logical_or.reduceat(seen, starts)
            known[queries.tobytes()] = int(sizes[blocks].sum())
        visited += int(size) * known[queries.tobytes()]
    return visited / len(place) ** 2


def visited_in_boxes(axes: tuple[WindowAxis, ...], dim: int = 128) -> float:
    """Share of the pairs in the boxes of our kernel, as it is launched on an H100 in bf16."""
    config = box_config(axes, dim, torch.bfloat16.itemsize, H100)
    boxes = zip(axes, config.query, config.key, strict=True)
    return prod(visited_along(axis, queries, keys) for axis, queries, keys in boxes)


def row_of(case: Case) -> Row:
    """Counts one case."""
    raster = visited_in_blocks(case.axes, "raster")
    boxes = visited_in_boxes(case.axes)
    return Row(
        case=case.name,
        tokens=prod(case.grid),
        window="x".join(str(axis.kernel) for axis in case.axes),
        exact=prod(map(seen_share, case.axes)),
        raster_blocks=raster,
        brick_blocks=visited_in_blocks(case.axes, "brick"),
        hilbert_blocks=visited_in_blocks(case.axes, "hilbert"),
        kernel_boxes=boxes,
        published_exact=case.exact,
        published_raster=case.raster,
        published_tiles=case.tiles,
        saving=raster / boxes,
        published_saving=case.raster / case.tiles,
    )


COLUMNS: dict[str, Column] = {
    field.name: f"{{0.{field.name}{':.3f' if field.type == 'float' else ''}}}"
    for field in fields(Row)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Counts, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(argv)
    rows = [row_of(case) for case in CASES]
    print("\n".join(table(rows, COLUMNS)))
    if options.csv:
        write_rows(options.csv, rows)
    return 0


def _seen(axes: tuple[WindowAxis, ...], queries: np.ndarray) -> np.ndarray:
    """Which places of a frame some of these queries see: (height * width,) bool."""
    rows, columns = axes
    edges = np.zeros((rows.length + 1, columns.length + 1), dtype=np.int32)
    for place in queries:
        (top, bottom), (left, right) = (
            window(int(at), axis.length, axis)
            for at, axis in zip(divmod(int(place), columns.length), axes, strict=True)
        )
        edges[top, left] += 1
        edges[bottom, right] += 1
        edges[top, right] -= 1
        edges[bottom, left] -= 1
    return (edges.cumsum(0).cumsum(1)[:-1, :-1] > 0).ravel()


if __name__ == "__main__":
    sys.exit(main())
