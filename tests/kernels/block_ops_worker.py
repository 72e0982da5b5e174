"""Runs the Triton kernels of block statistics and selection under TRITON_INTERPRET=1.

Silent when right. Runs in its own process: the variable is read when `@triton.jit` runs. bf16 is
left out, because the interpreter computes on its bit patterns.
"""

import sys

import torch
from kernel_problems import check_selection, check_summary, selection_problem, summary_problem

from diffaccel.kernels import SelectionCall, StatisticsCall, reference, select_blocks
from diffaccel.kernels.block_selection.op import select
from diffaccel.kernels.block_statistics.call import OPTIONAL
from diffaccel.kernels.block_statistics.launch import block_statistics_triton, tile_config
from diffaccel.kernels.block_statistics.op import summarise


def by_triton(*arguments, **options):
    return select(SelectionCall(*arguments, **options, backend="triton"))


def check_large_rows(blocks):
    """More blocks than one warp holds, some of them many ties, of which the first are kept."""
    problem = selection_problem(3, blocks=blocks) | {"text": None, "forced": None, "p_remain": 0.2}
    problem["scores"] = problem["scores"][:1, :1, :1]
    found = by_triton(**problem, return_kept=True)
    check_selection(found, problem, reference.select_blocks)
    flat = torch.full((1, 1, 1, blocks), 2.0**-12)
    _, counts = by_triton(flat, blocks - 1)
    assert int(counts) == blocks - 1
    for part in (0.0, 0.5):  # of one block: the sum of 701 blocks is the first to exceed both
        _, counts = by_triton(flat, 1, p_remain=(700 + part) * 2.0**-12)
        assert int(counts) == 701


def check_every_row_has_its_own_text():
    scores = torch.full((2, 2, 4, 9), 2.0**-5)
    scores[..., -1] = torch.arange(16).view(2, 2, 4) * 2.0**-5
    problem = {"scores": scores[..., :-1], "text": scores[..., -1], "top_k": 1, "p_remain": 0.45}
    found = by_triton(**problem, return_kept=True)
    check_selection(found, problem, reference.select_blocks)


def check_longer_rows_than_the_lists_stay_inside():
    """As on CUDA, where nobody reads the counts: the last blocks of a row are cut off."""
    scores = torch.rand(1, 2, 3, 9) + 0.1
    indices, counts = by_triton(scores, 7, max_count=4)
    expected, _ = select_blocks(scores, 7)
    assert torch.equal(indices, expected[..., :4]) and (counts == 4).all()


def check_rows_with_nan_are_valid():
    scores = torch.rand(1, 1, 2, 9)
    scores[0, 0, 0, 4] = scores[0, 0, 1] = torch.nan
    for p_remain in (0.0, 0.5):
        indices, counts = by_triton(scores, 3, p_remain=p_remain)
        assert ((indices >= 0) & (indices < 9)).all()
        assert 0 <= int(counts.min()) <= int(counts.max()) <= indices.shape[-1]
        expected, expected_counts = select_blocks(scores, 3, p_remain=p_remain)
        assert torch.equal(counts, expected_counts) and torch.equal(indices, expected)
        assert 4 in indices[0, 0, 0, : int(counts[0, 0, 0])]  # NaN is the largest score


def check_channels_of_several_programs():
    """Large blocks: a program sees 16 of 40 channels, and the deviation is a sum over all."""
    assert tile_config(300, 300, 40).block_d == 16
    tokens = torch.randn(3, 2, 300, 2, 40, generator=torch.Generator().manual_seed(0)).unbind(0)
    problem = {"valid": torch.arange(300) < torch.tensor([[300], [190]]), "order": None}
    problem |= dict(zip(("query", "key", "value"), tokens, strict=True))
    problem |= {"needs": frozenset(OPTIONAL), "block": 300}
    found = summarise(StatisticsCall(**problem, backend="triton"))
    check_summary(found, problem, reference.block_statistics)


def check_equal_tokens_and_what_is_not_finite():
    tokens = torch.randn(3, 1, 1, 2, 8).expand(3, 1, 37, 2, 8).contiguous()
    valid = torch.rand(1, 37) < 0.7
    tokens[:, ~valid] = torch.nan
    spread = ("query_variance", "key_variance", "value_deviation")
    call = StatisticsCall(*tokens, 20, valid, needs=frozenset(OPTIONAL), backend="triton")
    assert all((getattr(summarise(call), field) == 0).all() for field in spread)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        bad = torch.randn(3, 1, 37, 2, 8)
        bad[:, 0, 21, 1, 3] = wrong
        found = summarise(StatisticsCall(*bad, 20, needs=call.needs, backend="triton"))
        for field in spread:
            summary = getattr(found, field)
            place = (0, 1, 1, 3)[: summary.dim()]
            assert summary[place].isnan() and summary.isnan().sum() == 1, field


def check_junk_order_stays_inside():
    """Behind the checks, as on CUDA: entries that nobody checked are clamped."""
    tokens = torch.randn(3, 1, 20, 1, 16).unbind(0)
    junk, clamped = torch.full((20,), 2**31 - 1), torch.full((20,), 19)
    junk[3], clamped[3] = -(2**31), 0
    found, expected = (
        block_statistics_triton(
            StatisticsCall(*tokens, 16, order=order.int(), needs=frozenset(OPTIONAL))
        )
        for order in (junk, clamped)
    )
    assert all(map(torch.equal, found, expected))


if __name__ == "__main__":
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for seed in range(10):
        for dtype in (torch.float32, torch.float16):
            print(f"summaries, {seed=}, {dtype}", file=sys.stderr)  # the last one has failed
            problem = summary_problem(seed, dtype)
            found = summarise(StatisticsCall(**problem, backend="triton"))
            check_summary(found, problem, reference.block_statistics)
    for seed in range(16):
        print(f"selection, {seed=}", file=sys.stderr)
        problem = selection_problem(seed)
        found = by_triton(**problem, return_kept=True)
        check_selection(found, problem, reference.select_blocks)
    check_large_rows(1500)
    check_every_row_has_its_own_text()
    check_longer_rows_than_the_lists_stay_inside()
    check_rows_with_nan_are_valid()
    check_junk_order_stays_inside()
    check_channels_of_several_programs()
    check_equal_tokens_and_what_is_not_finite()
