"""The published densities of FreeSwim's window, counted by our own code."""

import csv
from pathlib import Path

import pytest
import torch

from diffaccel.benchmarks.studies.window_density import (
    CASES,
    Case,
    Row,
    visited_in_blocks,
    visited_in_boxes,
)
from diffaccel.kernels import reference, seen_share
from diffaccel.layout import TokenLayout
from diffaccel.methods.block_sparse.order import token_order

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "window-density.csv"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_kernel_saves_at_least_what_was_published(case):
    """Compact boxes against strips of rows: 1.3 to 3.5 times less, at the same windows."""
    frames, height, width = case.axes
    assert frames.is_dense
    assert seen_share(height) * seen_share(width) == pytest.approx(case.exact, abs=1e-3)
    assert visited_in_boxes(case.axes) <= case.tiles


def test_blocks_in_raster_order_are_as_published_and_bricks_save():
    case = CASES[0]
    raster = visited_in_blocks(case.axes, "raster")
    assert raster == pytest.approx(case.raster, abs=2e-3)
    assert raster / visited_in_blocks(case.axes, "brick") > 1.7


@pytest.mark.parametrize("order", ["raster", "brick", "hilbert"])
def test_counted_blocks_are_those_that_hold_a_visible_pair(order):
    """Against the dense mask of all pairs."""
    case = Case("small", (2, 9, 14), (2, 4, 6), 0, 0, 0)
    tokens = token_order(case.grid, order, 16).order
    height, width = (
        reference.neighborhood_mask(axis.length, axis.kernel) for axis in case.axes[1:]
    )
    mask = torch.kron(torch.ones(2, 2), torch.kron(height.float(), width.float())).bool()
    mask = mask[tokens][:, tokens]
    visited = 0
    for query in range(0, len(tokens), 16):
        for key in range(0, len(tokens), 16):
            block = mask[query : query + 16, key : key + 16]
            visited += block.numel() * bool(block.any())
    assert visited_in_blocks(case.axes, order, 16) == pytest.approx(visited / mask.numel())
    layout = TokenLayout.video(*case.grid)
    assert layout.length == len(tokens)


def test_the_committed_table_is_that_of_these_cases():
    with RESULTS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert list(rows[0]) == list(Row.__annotations__)
    for row, case in zip(rows, CASES, strict=True):
        assert float(row["raster_blocks"]) == pytest.approx(case.raster, abs=2e-3)
        assert float(row["kernel_boxes"]) == pytest.approx(visited_in_boxes(case.axes), abs=1e-5)
        assert float(row["brick_blocks"]) < float(row["raster_blocks"])
        assert float(row["saving"]) >= float(row["published_saving"])
