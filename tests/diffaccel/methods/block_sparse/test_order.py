import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.methods.block_sparse.hilbert import hilbert_curve
from diffaccel.methods.block_sparse.order import (
    ORDERS,
    brick_size,
    first_frame_blocks,
    neighbor_blocks,
    token_order,
)

sides = st.integers(1, 17)


def coordinates(grid):
    frames, height, width = grid
    return torch.cartesian_prod(*(torch.arange(side) for side in (frames, height, width)))


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 9), sides, sides), st.sampled_from(sorted(ORDERS)))
def test_round_trip_is_the_identity_on_any_grid(grid, name):
    tokens = token_order(grid, name, 16)
    count = grid[0] * grid[1] * grid[2]
    assert torch.equal(tokens.order[tokens.inverse], torch.arange(count))
    assert torch.equal(tokens.inverse[tokens.order], torch.arange(count))


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(1, 9), sides, sides))
def test_hilbert_steps_go_to_a_cell_beside_or_diagonal(grid):
    cells = coordinates(grid)[torch.from_numpy(hilbert_curve(grid))]
    steps = cells.diff(dim=0).abs()
    assert steps.numel() == 0 or (steps.max() <= 1 and steps.sum(-1).max() <= 2)


@pytest.mark.parametrize("grid", [(1, 64, 64), (1, 32, 90), (1, 256, 256), (8, 8, 8)], ids=str)
def test_hilbert_never_jumps_on_even_grids(grid):
    cells = coordinates(grid)[torch.from_numpy(hilbert_curve(grid))]
    assert (cells.diff(dim=0).abs().sum(-1) == 1).all()


@pytest.mark.parametrize(("grid", "published"), [((21, 45, 80), 17.3), ((21, 30, 52), 17.1)])
def test_hilbert_blocks_have_as_few_neighbors_as_measured_for_the_reference(grid, published):
    neighbors = neighbor_blocks(grid, "hilbert", 128).sum(-1).float().mean()
    assert neighbors == pytest.approx(published, abs=0.3)


def test_large_grids_are_ordered_in_well_below_a_second():
    start = time.process_time()
    hilbert_curve((32, 45, 80))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("grid", [(1, 7, 13), (3, 5, 9), (4, 4, 4), (1, 1, 40)], ids=str)
def test_neighbor_blocks_equal_the_definition(grid, name):
    block = 16
    tokens = token_order(grid, name, block)
    cells = coordinates(grid)
    adjacent = (cells[:, None] - cells[None]).abs().amax(-1) <= 1
    block_of = tokens.inverse // block
    expected = torch.zeros(tokens.blocks, tokens.blocks, dtype=torch.bool)
    for a, b in adjacent.nonzero().tolist():
        expected[block_of[a], block_of[b]] = True
    assert torch.equal(neighbor_blocks(grid, name, block), expected)


def test_first_frame_blocks_hold_tokens_of_the_true_first_frame():
    grid, block = (5, 6, 7), 16
    holds = first_frame_blocks(grid, "hilbert", block)
    tokens = token_order(grid, "hilbert", block)
    for number, run in enumerate(tokens.order.split(block)):
        assert holds[number] == (run < 6 * 7).any()
    assert 0 < holds.sum() < holds.numel()


@pytest.mark.parametrize(
    ("grid", "size"),
    [((32, 45, 80), (4, 4, 8)), ((1, 64, 64), (1, 8, 16)), ((1, 1, 500), (1, 1, 128))],
    ids=str,
)
def test_brick_is_near_a_cube_or_square_that_fits_the_grid(grid, size):
    assert brick_size(grid, 128) == size


def test_brick_order_fills_whole_bricks_where_they_divide_the_grid():
    order = token_order((4, 8, 16), "brick", 64).order
    cells = coordinates((4, 8, 16))[order].unflatten(0, (-1, 64))
    extent = cells.amax(1) - cells.amin(1) + 1
    assert (extent.prod(-1) == 64).all()


def test_raster_leaves_the_tokens_where_they_are():
    assert torch.equal(token_order((2, 3, 4), "raster", 16).order, torch.arange(24))


def test_orders_are_cached_and_moved_once():
    assert token_order((2, 3, 4), "hilbert", 16) is token_order((2, 3, 4), "hilbert", 16)
    tokens = token_order((2, 3, 4), "hilbert", 16)
    assert tokens.to("cpu") is tokens
    assert tokens.to("meta") is tokens.to("meta")
    assert tokens.to("meta").order.device.type == "meta"


def test_order_built_in_inference_mode_serves_gradients_later():
    token_order.cache_clear()
    neighbor_blocks.cache_clear()
    with torch.inference_mode():
        order = token_order((1, 11, 13), "hilbert", 16).order
        neighbors = neighbor_blocks((1, 11, 13), "hilbert", 16)
    values = torch.randn(143, requires_grad=True)
    values.index_select(0, order).sum().backward()
    assert not neighbors.is_inference()


def test_axes_cannot_be_swapped_unnoticed():
    for grid in itertools.permutations((2, 3, 5)):
        cells = coordinates(grid)[token_order(grid, "hilbert", 16).order]
        assert tuple((cells.amax(0) + 1).tolist()) == grid
