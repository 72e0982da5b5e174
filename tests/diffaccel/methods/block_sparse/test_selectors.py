import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.methods.block_sparse.order import first_frame_blocks, neighbor_blocks
from diffaccel.methods.block_sparse.selectors import TopBlocks, block_lists, forced_blocks

CPU = torch.device("cpu")


def probabilities(rows, blocks, text=0.0, seed=0, batch=1, heads=2):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(batch, heads, rows, blocks, generator=generator)
    visual = raw / raw.sum(-1, keepdim=True) * (1 - text)
    return torch.cat([visual, torch.full_like(visual[..., :1], text)], -1)


def chosen_by_definition(row, keep, p_remain):
    visual, text = row[:-1].tolist(), row[-1].item()
    ranked = sorted(range(len(visual)), key=lambda m: (-visual[m], m))
    mass, covered = text, 0
    for m in ranked:
        mass += visual[m]
        covered += mass <= p_remain
    count = max(covered + 1, int(keep * len(visual) + 1e-6), 1)
    return sorted(ranked[:count])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 23),
    st.floats(0.01, 1.0),
    st.sampled_from([0.0, 0.3, 0.7, 0.97]),
    st.sampled_from([0.0, 0.2, 0.8]),
    st.integers(0, 99),
)
def test_top_blocks_equal_the_definition(blocks, keep, p_remain, text, seed):
    probability = probabilities(3, blocks, text, seed)
    kept = TopBlocks(keep, p_remain).select(probability)
    for row, expected in zip(kept[0, 1], probability[0, 1], strict=True):
        assert row.nonzero().flatten().tolist() == chosen_by_definition(expected, keep, p_remain)


def test_ties_go_to_the_lowest_index():
    probability = torch.full((1, 1, 1, 9), 0.1)
    probability[..., 5] = 0.2
    for p_remain in (0.0, 1e-9):
        kept = TopBlocks(0.375, p_remain).select(probability)[0, 0, 0]
        assert kept.nonzero().flatten().tolist() == [0, 1, 5]


def test_mass_binds_where_attention_is_spread_out_and_top_k_where_it_is_not():
    flat = torch.full((1, 1, 1, 21), 0.05)
    flat[..., -1] = 0.0
    peaked = torch.zeros(1, 1, 1, 21)
    peaked[..., 3] = 0.9
    peaked[..., 4:-1] = 0.1 / 16
    selector = TopBlocks(0.1, 0.3)
    assert selector.select(flat).sum() in (6, 7)  # 0.05 is not representable
    assert selector.select(peaked).sum() == 2


def test_text_mass_counts_so_that_text_heavy_rows_need_few_blocks():
    assert TopBlocks(0.1, 0.3).select(probabilities(1, 20, text=0.8)).sum(-1).max() == 2


@pytest.mark.parametrize(("keep", "blocks", "count"), [(1 - 0.8, 10, 2), (1 - 0.9, 10, 1)])
def test_top_k_does_not_lose_a_block_to_rounding(keep, blocks, count):
    assert TopBlocks(keep).top_k(blocks) == count


def test_top_k_is_at_least_one_and_at_most_all():
    assert TopBlocks(0.01).top_k(5) == 1
    assert TopBlocks(1.0).top_k(5) == 5


def test_forced_blocks_are_kept_and_blocks_without_probability_are_not():
    probability = probabilities(6, 6)
    probability[..., 2] = 0.0
    forced = torch.eye(6, dtype=torch.bool)
    kept = TopBlocks(0.2).select(probability, forced)
    diagonal = kept.diagonal(dim1=-2, dim2=-1)
    assert diagonal[..., [0, 1, 3, 4, 5]].all()
    assert not kept[..., 2].any()


@pytest.mark.parametrize("p_remain", [0.0, 0.3])
def test_max_count_bounds_every_row(p_remain):
    forced, largest, _ = forced_blocks((1, 24, 40), "hilbert", 16, True, False, CPU)
    probability = probabilities(60, 60)
    selector = TopBlocks(0.1, p_remain)
    counts = selector.select(probability, forced).sum(-1)
    assert counts.max() <= selector.max_count(60, largest)
    assert (selector.max_count(60, largest) < 60) == (p_remain == 0.0)


def test_forced_blocks_join_neighbors_and_true_first_frame():
    grid = (6, 8, 8)
    neighbors = neighbor_blocks(grid, "hilbert", 16)
    holds = first_frame_blocks(grid, "hilbert", 16)
    both, largest, share = forced_blocks(grid, "hilbert", 16, True, True, CPU)
    assert torch.equal(both, neighbors | (holds[:, None] & holds))
    assert largest == both.sum(-1).max()
    assert share == pytest.approx(both.double().mean().item())
    frame, _, _ = forced_blocks(grid, "hilbert", 16, False, True, CPU)
    assert torch.equal(frame, holds[:, None] & holds)
    assert forced_blocks(grid, "hilbert", 16, False, False, CPU) == (None, 0, 0.0)


def test_neighbors_of_a_tiny_grid_are_everything():
    assert forced_blocks((1, 6, 8), "hilbert", 16, True, False, CPU).is_everything


def test_first_frame_rule_does_not_apply_to_an_image():
    assert forced_blocks((1, 24, 40), "hilbert", 16, False, True, CPU) == (None, 0, 0.0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=5))
def test_lists_hold_what_was_kept_ascending_and_unique(rows):
    kept = torch.tensor(rows)[None, None]
    width = int(kept.sum(-1).max())
    indices, counts = block_lists(kept, width)
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape[-1] == width and indices.is_contiguous()
    for row, listed, count in zip(kept[0, 0], indices[0, 0], counts[0, 0], strict=True):
        assert listed[:count].tolist() == row.nonzero().flatten().tolist()
        assert ((listed >= 0) & (listed < 9)).all()
