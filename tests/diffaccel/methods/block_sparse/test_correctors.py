from dataclasses import replace

import pytest
import torch

from diffaccel.kernels import block_sparse_attention, block_statistics
from diffaccel.layout import TokenLayout
from diffaccel.methods.block_sparse.correctors import (
    CalibratedCentroids,
    NoCorrection,
    PooledReallocation,
    Selected,
    calibrated_damping,
    is_gain,
)
from diffaccel.methods.block_sparse.estimator import block_attention
from diffaccel.methods.block_sparse.selectors import TopBlocks, block_lists
from diffaccel.methods.inputs import ExactTokens, VisualTokens

ALL = slice(None)


def setting(spread=1.0, tokens=111, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens_in_blocks():
        centers = torch.randn(2, 7, 2, 32, generator=generator).repeat_interleave(16, 1)
        noise = torch.randn(2, 112, 2, 32, generator=generator)
        return (centers + spread * noise)[:, :tokens]

    query, key, value = (tokens_in_blocks() for _ in range(3))
    statistics = block_statistics(query, key, value, 16)
    text_key = torch.randn(2, 5, 2, 32, generator=generator)
    probability = block_attention(statistics, ExactTokens(text_key, text_key, None), 32**-0.5)
    return statistics, probability, TopBlocks(0.3).select(probability)


@pytest.mark.parametrize("spread", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("gapr", [True, False])
def test_scale_and_weights_are_shares_that_sum_to_one(spread, gapr):
    statistics, probability, kept = setting(spread)
    ones = statistics.value_mean.new_ones(statistics.value_mean.shape)
    as_ones = replace(statistics, value_mean=ones)
    scale, bias = PooledReallocation(gapr).correct(as_ones, probability, kept, ALL)
    assert ((scale >= 0) & (scale <= 1)).all() and (bias >= 0).all()
    total = scale[..., None] + bias
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gapr", [True, False])
def test_correction_equals_the_published_formula(gapr):
    statistics, probability, kept = setting(0.3)
    scale, bias = PooledReallocation(gapr).correct(statistics, probability, kept, ALL)
    gain = is_gain(statistics) if gapr else torch.ones_like(kept)
    visual, text = probability[..., :-1], probability[..., -1]
    exact = text + (visual * kept).sum(-1) + (visual * (~kept & ~gain)).sum(-1)
    weights = visual * (~kept & gain)
    expected = torch.einsum("bhnm,bhmd->bhnd", weights, statistics.value_mean)
    torch.testing.assert_close(scale, exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias, expected, atol=1e-6, rtol=1e-5)
    assert (weights > 0).any()


def test_gain_equals_the_definition_pair_by_pair():
    statistics, _, _ = setting(0.4, seed=3)
    gain = is_gain(statistics)
    for b, h, n, m in [(0, 0, 0, 1), (1, 1, 6, 2), (0, 1, 3, 3), (1, 0, 2, 6), (0, 0, 5, 4)]:
        query, key = statistics.query_mean[b, h, n], statistics.key_mean[b, h, m]
        error = (statistics.query_spread[b, h, n] @ key).abs() + (
            query @ statistics.key_spread[b, h, m]
        ).abs()
        assert gain[b, h, n, m] == ((query @ key).abs() > error)
    assert gain.any() and not gain.all()


def test_gate_rejects_everything_where_spread_dominates():
    statistics, probability, kept = setting(1.0)
    statistics.key_mean.mul_(1e-3)
    statistics.query_mean.mul_(1e-3)
    statistics.query_spread.fill_(1.0)
    statistics.key_spread.fill_(1.0)
    statistics.key_mean.abs_()
    statistics.query_mean.abs_()
    scale, bias = PooledReallocation(True).correct(statistics, probability, kept, ALL)
    assert (scale == 1).all() and (bias == 0).all()


def test_gate_trusts_everything_without_spread():
    statistics, _, _ = setting(0.0)
    statistics.query_spread.zero_()
    statistics.key_spread.zero_()
    assert is_gain(statistics).all()


def test_gate_is_strict_so_that_a_zero_logit_is_rejected():
    statistics, _, _ = setting(0.0)
    statistics.query_mean.zero_()
    statistics.query_spread.zero_()
    assert not is_gain(statistics).any()


def test_gate_depends_on_a_shift_of_all_keys_as_documented():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 64, 2, 32, generator=generator) for _ in range(3))
    before = is_gain(block_statistics(query, key, value, 16))
    after = is_gain(block_statistics(query, key + 5.0, value, 16))
    assert not torch.equal(before, after)


def test_rows_can_be_corrected_in_parts():
    statistics, probability, kept = setting(0.3)
    corrector = PooledReallocation(True)
    whole = corrector.correct(statistics, probability, kept, ALL)
    part = slice(2, 5)
    some = corrector.correct(statistics, probability[:, :, part], kept[:, :, part], part)
    for full, piece in zip(whole, some, strict=True):
        torch.testing.assert_close(full[:, :, part], piece)


def test_no_correction_says_nothing_and_needs_nothing():
    statistics, probability, kept = setting()
    assert NoCorrection().correct(statistics, probability, kept, ALL) is None
    assert not NoCorrection().needs


def test_everything_is_decided_without_waiting_for_the_device():
    """Meta tensors have no values: reading one, as a host synchronisation does, raises."""
    tokens = [torch.empty(2, 1000, 3, 64, device="meta") for _ in range(3)]
    valid = torch.ones(2, 1000, dtype=torch.bool, device="meta")
    text = torch.empty(2, 7, 3, 64, device="meta")
    forced = torch.ones(63, 63, dtype=torch.bool, device="meta")
    statistics = block_statistics(*tokens, 16, valid)
    weights = block_attention(statistics, ExactTokens(text, text, valid[:, :7]), 0.1)
    selector = TopBlocks(0.2, 0.3)
    kept = selector.select(weights, forced)
    indices, counts = block_lists(kept, selector.max_count(63, 9))
    scale, bias = PooledReallocation(True).correct(statistics, weights, kept, ALL)
    assert indices.shape == (2, 3, 63, 63) and counts.shape == (2, 3, 63)
    assert scale.shape == (2, 3, 63) and bias.shape == (2, 3, 63, 64)


def selected_blocks(spread, keep=0.3, text=5):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(2, 7, 2, 32, generator=generator).repeat_interleave(16, 1)
    query, key = (
        (centers + spread * torch.randn(2, 112, 2, 32, generator=generator))[:, :111]
        for _ in range(2)
    )
    statistics = block_statistics(query, key, key, 16, needs={"value_mean", "key_variance"})
    text_key = torch.randn(2, text, 2, 32, generator=generator)
    probability = block_attention(statistics, ExactTokens(text_key, text_key, None), 0.3)
    indices, counts = block_lists(TopBlocks(keep).select(probability), 7)
    visual = VisualTokens(query, key, key, None, TokenLayout.image(1, query.shape[1]), 0.3)
    exact = ExactTokens(text_key, text_key, None)
    return statistics, Selected(visual, exact, indices, counts, 16)


@pytest.mark.parametrize("spread", [0.2, 0.7])
def test_calibration_gives_sampled_rows_the_right_normaliser(spread):
    """Over exactly those rows, the lse of the kernel with centroids is right on average."""
    statistics, selected = selected_blocks(spread)
    centroids = CalibratedCentroids().centroids(statistics, selected)
    query, key, lses = selected.visual.query, selected.visual.key, []
    for summaries in (centroids, centroids._replace(variance=None)):
        _, lse = block_sparse_attention(
            query, key, key, selected.indices, selected.counts,
            block_q=16, block_k=16, scale=0.3, extra_key=selected.exact.key,
            extra_value=selected.exact.key, centroids=summaries, return_lse=True,
        )  # fmt: skip
        lses.append(lse)
    everything = torch.cat([selected.visual.key, selected.exact.key], 1)
    exact = (0.3 * torch.einsum("bnhd,bmhd->bnhm", selected.visual.query, everything)).logsumexp(
        -1
    )
    rows = ((torch.arange(32) + 0.5) * 111 / 32).long()
    calibrated, undamped = ((lse - exact)[:, rows].mean(1) for lse in lses)
    assert calibrated.abs().max() < 2e-3
    assert undamped.abs().min() > 5 * calibrated.abs().max()


def test_without_anything_left_out_the_centroids_have_no_influence():
    statistics, selected = selected_blocks(0.5, keep=1.0)
    damping = calibrated_damping(statistics, selected)
    assert damping.isfinite().all() and (damping >= 0).all()
    arguments = dict(block_q=16, block_k=16, scale=0.3)
    tokens = (
        selected.visual.query,
        selected.visual.key,
        selected.visual.key,
        selected.indices,
        selected.counts,
    )
    plain = block_sparse_attention(*tokens, **arguments)
    centroids = CalibratedCentroids().centroids(statistics, selected)
    output = block_sparse_attention(*tokens, **arguments, centroids=centroids)
    torch.testing.assert_close(output, plain, atol=1e-6, rtol=1e-6)
