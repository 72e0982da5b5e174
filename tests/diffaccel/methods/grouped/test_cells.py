"""Cells of the token grid: means, growth with the grid, groups, matching."""

from math import prod

import pytest
import torch

from diffaccel import AgentAttn
from diffaccel.kernels import reference
from diffaccel.methods.grouped.cells import Cells, group_means


@pytest.mark.parametrize("grid", [(1, 7, 9), (1, 5, 12), (3, 4, 7)])
def test_pooled_queries_are_the_queries_of_pooled_features(grid):
    """Averaging and projecting commute, so that pooling needs no features."""
    generator = torch.Generator().manual_seed(0)
    features, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, prod(grid), 1, 6), (6, 10))
    )
    cells = Cells(grid, (1, 4, 3))
    pooled = cells.means(features).tokens @ weight
    torch.testing.assert_close(cells.means(features @ weight).tokens, pooled, atol=1e-12, rtol=0)
    assert pooled.shape[1] == grid[0] * -(-grid[1] // 4) * -(-grid[2] // 3)


@pytest.mark.parametrize(
    ("grid", "cell", "most", "size"),
    [
        ((1, 64, 64), 4, 256, (1, 4, 4)),
        ((1, 512, 512), 4, 256, (1, 32, 32)),
        ((1, 96, 96), 4, 256, (1, 6, 6)),
        ((1, 128, 64), 4, 256, (1, 6, 6)),
        ((1, 128, 128), 4, None, (1, 4, 4)),
        ((1, 1, 4096), 4, 8, (1, 1, 512)),
        ((40, 2, 3), (1, 1, 1), 10, (4, 2, 3)),
    ],
)
def test_cells_grow_with_the_grid(grid, cell, most, size):
    cells = AgentAttn(cell, most_agents=most).cells(grid)
    assert cells.size == size
    assert most is None or cells.number <= most
    assert cells.number == prod(-(-a // b) for a, b in zip(grid, size, strict=True))


def test_sums_have_one_order():
    """The means of groups are the same bits, whatever the device does with scattered sums."""
    tokens = torch.randn(2, 400, 2, 40, generator=torch.Generator().manual_seed(1))
    group = torch.randint(0, 7, (2, 400), generator=torch.Generator().manual_seed(0))
    means, counts = group_means(tokens, group, 9)
    expected, expected_counts = reference.groups.group_means(tokens, group, 9)
    torch.testing.assert_close(means.double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(counts.double(), expected_counts) and not means[:, 7:].any()


def test_matching_in_parts_is_matching_at_once(monkeypatch):
    key = torch.randn(2, 120, 2, 16, generator=torch.Generator().manual_seed(1))
    cells = Cells((1, 12, 10), (1, 3, 3))
    whole = cells.matched(key)
    monkeypatch.setattr("diffaccel.methods.grouped.cells._MOST_SCORES", 100)
    parts = cells.matched(key)
    assert torch.equal(parts.cell, whole.cell)
    torch.testing.assert_close(parts.similarity, whole.similarity)
