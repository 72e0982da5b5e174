import pytest
import torch

from diffaccel.methods.block_sparse.forced import forced_blocks
from diffaccel.methods.block_sparse.order import (
    first_frame_blocks,
    neighbor_blocks,
    token_order,
)
from diffaccel.methods.block_sparse.selectors import BlockGate, PooledAttention

CPU = torch.device("cpu")
NOTHING = (None, 0, 0.0)


def forced(grid, neighbors=False, first_frame=False, selector=None):
    selector = selector or PooledAttention()
    return forced_blocks(grid, "hilbert", 16, neighbors, first_frame, selector, CPU)


def test_forced_blocks_join_neighbors_the_true_first_frame_and_those_of_a_selector():
    grid = (6, 8, 8)
    neighbors = neighbor_blocks(grid, "hilbert", 16)
    holds = first_frame_blocks(grid, "hilbert", 16)
    both, largest, share = forced(grid, True, True)
    assert torch.equal(both, neighbors | (holds[:, None] & holds))
    assert largest == both.sum(-1).max()
    assert share == pytest.approx(both.double().mean().item())
    frame, _, _ = forced(grid, first_frame=True, selector=BlockGate())
    assert torch.equal(frame, (holds[:, None] & holds) | torch.eye(24, dtype=torch.bool))
    assert forced(grid) == NOTHING


def test_neighbors_of_a_tiny_grid_are_everything():
    assert forced((1, 6, 8), neighbors=True).is_everything


def test_the_first_frame_rule_does_not_apply_to_an_image():
    assert forced((1, 24, 40), first_frame=True) == NOTHING


@pytest.mark.parametrize("grid", [(4, 5, 6), (1, 7, 9), (3, 8, 8)])
def test_columns_run_through_all_frames_and_down_an_image(grid):
    order = token_order(grid, "columns", 16)
    assert sorted(order.order.tolist()) == list(range(grid[0] * grid[1] * grid[2]))
    frames, height, width = grid
    if frames == 1:
        assert order.order[:height].tolist() == list(range(0, height * width, width))
    else:
        place = order.order.view(-1, frames) % (height * width)
        assert (place == place[:, :1]).all()
