from dataclasses import replace

import pytest
import torch
from block_calls import all_rows, best_blocks, block_call

from diffaccel.kernels import block_lists, block_statistics
from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Ask, RowBudget, Scores
from diffaccel.methods.block_sparse.correctors import PooledReallocation
from diffaccel.methods.block_sparse.correctors.pooled import is_gain
from diffaccel.methods.block_sparse.estimator import block_attention
from diffaccel.methods.inputs import ExactTokens


def setting(spread=1.0, seed=0):
    call = block_call(spread, seed=seed)
    return call, all_rows(call), best_blocks(call, 2)


@pytest.mark.parametrize("spread", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("gapr", [True, False])
def test_scale_and_weights_are_shares_that_sum_to_one(spread, gapr):
    call, _, kept = setting(spread)
    ones = torch.ones_like(call.statistics.value_mean)
    as_ones = replace(call, statistics=replace(call.statistics, value_mean=ones))
    scale, bias = PooledReallocation(gapr).correct(all_rows(as_ones), kept)
    assert ((scale >= 0) & (scale <= 1)).all() and (bias >= 0).all()
    total = scale[..., None] + bias
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gapr", [True, False])
def test_correction_equals_the_published_formula(gapr):
    call, rows, kept = setting(0.3)
    scale, bias = PooledReallocation(gapr).correct(rows, kept)
    gain = is_gain(call.statistics) if gapr else torch.ones_like(kept)
    visual, text = rows.probability[..., :-1], rows.probability[..., -1]
    exact = text + (visual * kept).sum(-1) + (visual * (~kept & ~gain)).sum(-1)
    weights = visual * (~kept & gain)
    expected = torch.einsum("bhnm,bhmd->bhnd", weights, call.statistics.value_mean)
    torch.testing.assert_close(scale, exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias, expected, atol=1e-6, rtol=1e-5)
    assert (weights > 0).any()


def test_gain_equals_the_definition_pair_by_pair():
    statistics = setting(0.4, seed=3)[0].statistics
    gain = is_gain(statistics)
    for b, h, n, m in [(0, 0, 0, 1), (1, 1, 6, 2), (0, 1, 3, 3), (1, 0, 2, 6), (0, 0, 5, 4)]:
        query, key = statistics.query_mean[b, h, n], statistics.key_mean[b, h, m]
        error = (statistics.query_spread[b, h, n] @ key).abs() + (
            query @ statistics.key_spread[b, h, m]
        ).abs()
        assert gain[b, h, n, m] == ((query @ key).abs() > error)
    assert gain.any() and not gain.all()


def test_gate_rejects_everything_where_spread_dominates():
    call, rows, kept = setting()
    statistics = call.statistics
    statistics.key_mean.mul_(1e-3).abs_()
    statistics.query_mean.mul_(1e-3).abs_()
    statistics.query_spread.fill_(1.0)
    statistics.key_spread.fill_(1.0)
    scale, bias = PooledReallocation(True).correct(rows, kept)
    assert (scale == 1).all() and (bias == 0).all()


def test_gate_trusts_everything_without_spread():
    statistics = setting(0.0)[0].statistics
    statistics.query_spread.zero_()
    statistics.key_spread.zero_()
    assert is_gain(statistics).all()


def test_gate_is_strict_so_that_a_zero_logit_is_rejected():
    statistics = setting(0.0)[0].statistics
    statistics.query_mean.zero_()
    statistics.query_spread.zero_()
    assert not is_gain(statistics).any()


def test_gate_depends_on_a_shift_of_all_keys_as_documented():
    visual = block_call(seed=5).visual
    query, key, value = visual.query, visual.key, visual.value
    before = is_gain(block_statistics(query, key, value, 16))
    after = is_gain(block_statistics(query, key + 5.0, value, 16))
    assert not torch.equal(before, after)


def test_rows_can_be_corrected_in_parts():
    call, rows, kept = setting(0.3)
    whole = PooledReallocation(True).correct(rows, kept)
    part = slice(2, 5)
    some = PooledReallocation(True).correct(BlockRows(call, part), kept[:, :, part])
    for full, piece in zip(whole, some, strict=True):
        torch.testing.assert_close(full[:, :, part], piece)


def test_everything_is_decided_without_waiting_for_the_device():
    """Meta tensors have no values: reading one, as a host synchronisation does, raises."""
    tokens = [torch.empty(2, 1000, 3, 64, device="meta") for _ in range(3)]
    valid = torch.ones(2, 1000, dtype=torch.bool, device="meta")
    text = torch.empty(2, 7, 3, 64, device="meta")
    forced = torch.ones(63, 63, dtype=torch.bool, device="meta")
    statistics = block_statistics(*tokens, 16, valid)
    weights = block_attention(statistics, ExactTokens(text, text, valid[:, :7]), 0.1)
    budget, ask = RowBudget(), Ask(0.2, 0.3)
    kept = budget.kept(Scores(weights[..., :-1], weights[..., -1], forced), ask, None)
    indices, counts = block_lists(kept, budget.max_count(63, 9, ask))
    assert indices.shape == (2, 3, 63, 63) and counts.shape == (2, 3, 63)
