from itertools import pairwise

import pytest
import torch
from block_calls import best_blocks, block_call, chosen, summarised

from diffaccel.kernels.block_sparse.call import BlockSparseCall
from diffaccel.kernels.block_sparse.op import attend
from diffaccel.methods.block_sparse.correctors import CORRECTORS, BlockSummaries, BlockTail
from diffaccel.methods.block_sparse.correctors.base import KernelOutput
from diffaccel.methods.block_sparse.sampled_rows import sampled_rows, spread_rows


def dense(call):
    """Attention over everything in fp64: (B, N, H, D), and its lse (B, N, H)."""
    visual, text = call.visual, call.exact
    key, value = (
        torch.cat([a, b], 1).double()
        for a, b in ((visual.key, text.key), (visual.value, text.value))
    )
    scores = torch.einsum("bnhd,bmhd->bnhm", visual.query.double() * visual.scale, key)
    return torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), value), scores.logsumexp(-1)


def attended(call, kept, corrector):
    """What a corrector makes of the kept blocks, and the lse of the kernel."""
    picked = chosen(call, kept)
    summary, visual = corrector.summarise(picked), call.visual
    centroids = None if summary is None else summary.centroids
    found = attend(
        BlockSparseCall(
            visual.query, visual.key, visual.value, picked.indices, picked.counts,
            call.block, call.block, visual.scale, visual.valid, **call.exact.extras(),
            centroids=centroids, return_lse=True, return_tail=centroids is not None,
        )
    )  # fmt: skip
    return corrector.finish(picked, summary, KernelOutput(*found)), found[1]


def error(call, kept, corrector):
    """Relative error of the output."""
    exact = dense(call)[0]
    return float((attended(call, kept, corrector)[0] - exact).norm() / exact.norm())


@pytest.mark.parametrize("spread", [0.2, 0.7])
def test_the_normaliser_of_sampled_rows_is_right_on_average(spread):
    call = block_call(spread)
    kept = best_blocks(call, 2)
    exact = dense(call)[1]
    rows = spread_rows(111, 32, exact.device)
    fitted, undamped, without = (
        (attended(call, kept, CORRECTORS[name])[1] - exact)[:, rows].mean(1).abs()
        for name in ("normaliser", "variance", "means")
    )
    assert fitted.max() < 2e-3
    assert max(undamped.max(), without.max()) > 5 * fitted.max()


@pytest.mark.parametrize("spread", [0.3, 0.6, 1.0])
def test_each_part_lessens_the_error(spread):
    call = block_call(spread, tokens=480, batch=1)
    kept = best_blocks(call, 6)
    names = ("none", "means", "output", "value")
    errors = [error(call, kept, CORRECTORS[name]) for name in names]
    for larger, smaller in pairwise(errors):  # what is fitted on 32 rows may be off a little
        assert smaller < 1.01 * larger, dict(zip(names, errors, strict=True))


def test_the_fit_is_the_best_of_its_grid_on_the_sampled_rows():
    call = block_call(0.8, tokens=300)
    kept = best_blocks(call, 3)
    exact = dense(call)[0]
    rows = spread_rows(300, 32, exact.device)

    def sampled_error(corrector):
        output = attended(call, kept, corrector)[0]
        return (output - exact)[:, rows].square().sum((1, 3))  # (B, H)

    fitted = sampled_error(CORRECTORS["output"])
    for name in ("means", "variance"):  # which are in the grid
        assert (fitted <= sampled_error(CORRECTORS[name]) + 1e-5).all()


@pytest.mark.parametrize("name", CORRECTORS)
def test_constant_values_stay_constant(name):
    call = block_call(1.0)
    call.visual.value.fill_(0.75)
    call.exact.value.fill_(0.75)
    call.statistics.value_mean.fill_(0.75)
    output = attended(call, best_blocks(call, 2), CORRECTORS[name])[0]
    torch.testing.assert_close(output, torch.full_like(output, 0.75), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tail", "means", "variance", "normaliser", "output", "value"])
def test_blocks_of_alike_tokens_are_exact(name):
    call = block_call(0.0)
    assert error(call, best_blocks(call, 1), CORRECTORS[name]) < 1e-5


@pytest.mark.parametrize("name", ["tail", "output", "value"])
def test_what_is_computed_exactly_is_not_touched(name):
    call = block_call(1.0)
    everything = torch.ones(2, 2, 7, 7, dtype=torch.bool)
    assert error(call, everything, CORRECTORS[name]) < 1e-5


def test_the_value_term_is_exact_to_first_order():
    """Where keys hardly differ within blocks, values that follow them leave the second order."""
    call = block_call(0.0, tokens=320, batch=1, heads=1, seed=2)
    tilt = 0.3 * torch.randn(call.visual.key.shape, generator=torch.Generator().manual_seed(0))
    call.visual.key.add_(tilt)
    call.visual.value.add_(tilt.roll(1, -1))
    call = summarised(call)
    kept = best_blocks(call, 2)
    assert error(call, kept, CORRECTORS["value"]) < 0.5 * error(call, kept, CORRECTORS["output"])


def test_the_tail_is_the_mean_key_scored_by_the_mean_query():
    call = block_call(0.7)
    kept = best_blocks(call, 2)
    statistics, visual, text = call.statistics, call.visual, call.exact
    output = attended(call, kept, BlockTail())[0]
    for b, h, row in [(0, 0, 3), (1, 1, 50), (0, 1, 110)]:
        n, query = row // 16, visual.query[b, row, h] * visual.scale
        mean = statistics.query_mean[b, h, n] * visual.scale
        scores, values = [text.key[b, :, h] @ query], [text.value[b, :, h]]
        for m in range(call.number):
            place = slice(16 * m, min(111, 16 * m + 16))
            if kept[b, h, n, m]:
                scores.append(visual.key[b, place, h] @ query)
                values.append(visual.value[b, place, h])
            else:
                tokens = place.stop - place.start
                center = statistics.key_mean[b, h].mean(0)  # what each query scores for itself
                score = (statistics.key_mean[b, h, m] - center) @ mean + center @ query
                scores.append(score.expand(tokens))
                values.append(statistics.value_mean[b, h, m].expand(tokens, -1))
        expected = torch.cat(scores).softmax(-1) @ torch.cat(values)
        torch.testing.assert_close(output[b, row, h], expected, atol=1e-5, rtol=1e-5)


def test_sampled_rows_are_exact_whatever_is_kept():
    call = block_call(1.0)
    exact = dense(call)[0]
    picked = chosen(call, best_blocks(call, 2))
    sample = sampled_rows(picked, spread_rows(111, 20, exact.device))
    torch.testing.assert_close(
        sample.exact.double(), exact[:, sample.rows].transpose(1, 2), atol=1e-5, rtol=1e-5
    )
    assert sample.is_real.all()


def test_padding_is_ignored_even_where_it_is_nan():
    valid = torch.ones(2, 111, dtype=torch.bool)
    valid[:, 90:] = False
    found = []
    for filling in (0.0, float("nan")):
        call = block_call(0.8, valid=valid)
        visual = call.visual
        for tokens in (visual.query, visual.key, visual.value):
            tokens[:, 90:] = filling
        call = summarised(call)
        found.append(attended(call, best_blocks(call, 2), BlockSummaries())[0][:, :90])
    torch.testing.assert_close(*found)
    assert found[0].isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"fit": "best"}, "fit must be one of output, normaliser, none"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"fit": "none"}, "value_term needs fit='output'"),
        ({"fit": "normaliser", "variance": False, "value_term": False}, "damps the variance"),
        ({"rows": "32"}, "rows must be an integer"),
    ],
)
def test_wrong_knobs_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        BlockSummaries(**knobs)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 72), (128, 32), (9, 13)])
@pytest.mark.parametrize("count", [32, 64, 128])
def test_sampled_rows_see_all_of_a_grid(height, width, count):
    rows = spread_rows(height * width, count, torch.device("cpu"))
    assert len(rows.unique()) == min(count, height * width)
    for side, length in ((rows % width, width), (rows // width, height)):
        quarters = (side * 4 // length).bincount(minlength=4)
        assert quarters.min() >= 0.12 * len(rows) and quarters.max() <= 0.4 * len(rows)
