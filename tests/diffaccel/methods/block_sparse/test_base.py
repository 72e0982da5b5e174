"""What SparseAttn and RectifiedSpaAttn compute, against fp64 formulas written from the paper."""

import math

import pytest
import torch
from block_calls import smooth_tokens

from diffaccel.kernels import dense_attention, reference
from diffaccel.layout import Segment, TokenLayout
from diffaccel.methods import FullAttn, RectifiedSpaAttn, SparseAttn
from diffaccel.methods.block_sparse.order import first_frame_blocks, neighbor_blocks, token_order

PLAIN = {"selector": "pooled", "corrector": "none"}
METHODS = (
    SparseAttn(0.25, block=16, order="hilbert", **PLAIN),
    SparseAttn(0.25, block=16, p_remain=0.3, neighbors=True, order="brick", **PLAIN),
    RectifiedSpaAttn(0.75, block=16),
    RectifiedSpaAttn(0.75, block=16, gapr=False, order="raster"),
    RectifiedSpaAttn(0.75, block=16, correction="centroids"),
)
NAMES = ("sparse", "sparse-top-p-brick", "rectified", "accept-all-raster", "centroids")

LAYOUTS = {
    "1x11x13": TokenLayout.image(11, 13),
    "1x7x23+9": TokenLayout.image(7, 23, text_after=9),
    "6+1x16x8": TokenLayout.image(16, 8, text_before=6),
    "5+3x5x11+4": TokenLayout.video(3, 5, 11, text_before=5, text_after=4),
}


def oracle(query, key, value, layout, method, mask=None):
    """The method in fp64, one query block of one head at a time."""
    query, key, value = (x.double() for x in (query, key, value))
    batch, length, heads, channels = query.shape
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    output = reference.attention(query, key, value, mask[:, None, None])[0]
    visual = torch.arange(length)[layout.visual_slice]
    order = visual[token_order(layout.grid, method.order, method.block).order]
    others = torch.tensor([i for i in range(length) if i not in set(visual.tolist())]).long()
    runs = order.split(method.block)
    forced = torch.zeros(len(runs), len(runs), dtype=torch.bool)
    if method.neighbors:
        forced |= neighbor_blocks(layout.grid, method.order, method.block)
    if method.first_frame and layout.grid[0] > 1:
        holds = first_frame_blocks(layout.grid, method.order, method.block)
        forced |= holds[:, None] & holds
    for b in range(batch):
        valid = [run[mask[b, run]] for run in runs]
        text = others[mask[b, others]]
        for h in range(heads):
            at = (query[b, :, h], key[b, :, h], value[b, :, h])
            kept = {
                n: _oracle_kept(at, valid, text, forced, n, method)
                for n in range(len(runs))
                if len(valid[n])
            }
            damping = 0.0
            if getattr(method, "correction", "") == "centroids":
                is_real = [mask[b, i].item() for i in order.tolist()]
                damping = _oracle_damping(at, order, is_real, valid, text, kept, method.block)
            for n in kept:
                output[b, runs[n], h] = _oracle_block(
                    at, runs[n], valid, text, *kept[n], n, method, damping
                )
    return output


def _oracle_damping(at, order, is_real, valid, text, kept, block):
    """Bisects until 32 rows have the right normaliser on average, in plain fp64."""
    query, key, _ = at
    scale, count = query.shape[-1] ** -0.5, min(32, len(order))
    cases = []
    for i in range(count):
        within = (i + 0.5) * (math.sqrt(5) - 1) / 2 % 1  # the golden section
        place = int((i + within) * len(order) / count)
        if is_real[place]:
            n, row = place // block, scale * query[order[place]]
            exact = torch.cat([key[run] for run in valid] + [key[text]]) @ row
            seen = torch.cat([key[valid[m]] for m in kept[n][0]] + [key[text]]) @ row
            left = [run for m, run in enumerate(valid) if m not in kept[n][0] and len(run)]
            first = [key[run].mean(0) @ row + math.log(len(run)) for run in left]
            second = [key[run].var(0, correction=0) @ row**2 / 2 for run in left]
            cases.append((exact.logsumexp(0), seen, first, second))
    low, high = 0.0, 2.0
    for _ in range(12):
        middle, excess = (low + high) / 2, 0.0
        for exact, seen, first, second in cases:
            estimate = [a + middle * b for a, b in zip(first, second, strict=True)]
            excess += torch.cat([seen, torch.tensor(estimate).double()]).logsumexp(0) - exact
        low, high = (low, middle) if excess > 0 else (middle, high)
    return (low + high) / 2


def _oracle_kept(at, valid, text, forced, n, method):
    """Which blocks a query block keeps, and the predicted share of every block."""
    query, key, _ = at
    scale = query.shape[-1] ** -0.5
    mean_query = query[valid[n]].mean(0)
    pieces = [scale * key[run].mean(0).expand(len(run), -1) @ mean_query for run in valid]
    expanded = torch.cat([*pieces, scale * key[text] @ mean_query]).softmax(0)
    *shares, text_share = expanded.split([*map(len, valid), len(text)])
    shares, text_share = [share.sum().item() for share in shares], text_share.sum().item()

    ranked = sorted(range(len(valid)), key=lambda m: (-shares[m], m))
    covered, mass = 0, text_share
    for m in ranked:
        mass += shares[m]
        covered += mass <= method.p_remain
    keep = method.keep if isinstance(method, SparseAttn) else 1 - method.drop
    count = max(int(keep * len(valid) + 1e-6), 1)
    if method.p_remain > 0:
        count = max(count, covered + 1)
    kept = {*ranked[:count], *forced[n].nonzero().flatten().tolist()}
    return sorted(m for m in kept if len(valid[m])), shares


def _oracle_block(at, rows, valid, text, kept, shares, n, method, damping):
    query, key, value = at
    scale = query.shape[-1] ** -0.5
    keys = torch.cat([*(valid[m] for m in kept), text])
    weights = (scale * query[rows] @ key[keys].T).softmax(-1)
    exact = weights @ value[keys]
    if isinstance(method, SparseAttn):
        return exact
    if method.correction == "centroids":
        return _oracle_centroids(at, rows, valid, keys, kept, damping)
    mean_query = query[valid[n]].mean(0)
    spread_query = (query[valid[n]] - mean_query).abs().mean(0)
    returned, pooled = 1.0, torch.zeros(value.shape[-1]).double()
    for m, run in enumerate(valid):
        if m in kept or not len(run):
            continue
        mean_key = key[run].mean(0)
        spread_key = (key[run] - mean_key).abs().mean(0)
        error = (spread_query @ mean_key).abs() + (mean_query @ spread_key).abs()
        if method.gapr and not (mean_query @ mean_key).abs() > error:
            continue
        returned -= shares[m]
        pooled += shares[m] * value[run].mean(0)
    return returned * exact + pooled


def _oracle_centroids(at, rows, valid, keys, kept, damping):
    """One softmax over the kept keys and one stand-in for every block left out."""
    query, key, value = at
    scaled = query[rows] * query.shape[-1] ** -0.5
    scores, values = [scaled @ key[keys].T], [value[keys]]
    for m, run in enumerate(valid):
        if m not in kept and len(run):
            second = (scaled**2 @ key[run].var(0, correction=0)) / 2
            scores.append(scaled @ key[run].mean(0) + math.log(len(run)) + damping * second)
            values.append(value[run].mean(0))
    scores = torch.cat([scores[0], *(x[:, None] for x in scores[1:])], 1)
    return scores.softmax(-1) @ torch.cat([values[0], *(x[None] for x in values[1:])])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_equals_the_fp64_formula(method, layout):
    tokens = smooth_tokens(layout, batch=2, noise=0.2)
    output = method.attend(*tokens, layout)
    torch.testing.assert_close(
        output.double(), oracle(*tokens, layout, method), atol=1e-5, rtol=1e-5
    )
    assert (output - FullAttn().attend(*tokens, layout)).norm() > 1e-2  # and is no dense result


@pytest.mark.parametrize("channels", [40, 64, 80, 128])
def test_any_head_dim(channels):
    layout = LAYOUTS["1x7x23+9"]
    tokens = smooth_tokens(layout, heads=1, channels=channels)
    output = METHODS[2].attend(*tokens, layout)
    expected = oracle(*tokens, layout, METHODS[2])
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_first_frame_rule_keeps_first_frame_blocks_together():
    layout = TokenLayout.video(6, 6, 8, text_before=3)
    tokens = smooth_tokens(layout)
    method = RectifiedSpaAttn(0.9, block=16, neighbors=False, first_frame=True)
    output, density = method.attend_with_density(*tokens, layout)
    without = RectifiedSpaAttn(0.9, block=16, neighbors=False)
    expected = oracle(*tokens, layout, method)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert density > without.attend_with_density(*tokens, layout)[1]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_padding_equals_single_runs_whatever_the_padded_tokens_hold(method):
    layout = TokenLayout.image(12, 13, text_after=10)
    query, key, value = smooth_tokens(layout, batch=3)
    mask = torch.ones(3, layout.length, dtype=torch.bool)
    mask[0, 160:] = False  # text
    mask[1, 90:150] = False  # visual, some blocks completely
    poisoned = [x.masked_fill(~mask[..., None, None], torch.nan) for x in (key, value)]
    poison_query = query.masked_fill(~mask[..., None, None], torch.nan)
    output = method.attend(poison_query, *poisoned, layout, key_padding_mask=mask)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = (x[one] for x in (query, key, value))
        single = method.attend(*alone, layout, key_padding_mask=mask[one])
        real = mask[sample]
        torch.testing.assert_close(output[sample, real], single[0, real], atol=1e-5, rtol=1e-5)
    expected = oracle(query, key, value, layout, method, mask)
    torch.testing.assert_close(output[mask].double(), expected[mask], atol=1e-5, rtol=1e-5)


def test_padded_text_equals_shorter_text():
    query, key, value = smooth_tokens(TokenLayout.image(12, 13, text_after=10))
    mask = torch.arange(166)[None] < 160
    method = METHODS[2]
    padded = method.attend(
        query, key, value, TokenLayout.image(12, 13, text_after=10), key_padding_mask=mask
    )
    shorter = method.attend(
        query[:, :160], key[:, :160], value[:, :160], TokenLayout.image(12, 13, text_after=4)
    )
    torch.testing.assert_close(padded[:, :160], shorter, atol=1e-5, rtol=1e-5)


def test_a_sample_without_any_valid_key_stays_finite():
    layout = TokenLayout.image(12, 13)
    tokens = smooth_tokens(layout, batch=2)
    mask = torch.ones(2, layout.length, dtype=torch.bool)
    mask[1] = False
    for method in METHODS:
        output = method.attend(*tokens, layout, key_padding_mask=mask)
        assert output[0].isfinite().all() and (output[1] == 0).all()


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_text_rows_are_bit_equal_to_dense(method):
    layout = LAYOUTS["5+3x5x11+4"]
    tokens = smooth_tokens(layout, batch=2)
    output, dense = method.attend(*tokens, layout), dense_attention(*tokens)
    for part in layout.exact_slices:
        assert torch.equal(output[:, part], dense[:, part])


def test_condition_tokens_are_treated_like_text():
    query, key, value = smooth_tokens(TokenLayout.image(12, 13, text_before=9))
    as_text = TokenLayout.image(12, 13, text_before=9)
    visual = as_text.visual
    mixed = TokenLayout((Segment("text", 3), Segment("condition", 6, (1, 2, 3)), visual))
    for method in METHODS:
        assert torch.equal(
            method.attend(query, key, value, mixed), method.attend(query, key, value, as_text)
        )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "method",
    [
        SparseAttn(1.0, block=16),
        RectifiedSpaAttn(0.0, block=16),
        SparseAttn(0.1, block=256),
        RectifiedSpaAttn(0.9, block=128),
    ],
    ids=["keep=1", "drop=0", "N<block", "two blocks, neighbors"],
)
def test_keeping_everything_is_dense_bit_for_bit(method, layout):
    tokens = smooth_tokens(layout, batch=2)
    output, density = method.attend_with_density(*tokens, layout)
    assert torch.equal(output, dense_attention(*tokens)) and density == 1.0
    expected = reference.attention(*tokens)[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [SparseAttn, RectifiedSpaAttn])
def test_all_blocks_through_the_sparse_kernel_equal_dense(method):
    """p_remain=1 keeps everything, but only the data say so: no early way out to dense."""
    layout = LAYOUTS["5+3x5x11+4"]
    tokens = smooth_tokens(layout, batch=2)
    configured = method(block=16, p_remain=1.0)
    assert configured.shape_reason(layout) == ""
    output, density = configured.attend_with_density(*tokens, layout)
    assert float(density) > 0.99
    torch.testing.assert_close(
        output.double(), reference.attention(*tokens)[0], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_constant_values_stay_constant(method):
    layout = LAYOUTS["5+3x5x11+4"]
    query, key, value = smooth_tokens(layout)
    constant = value[:, :1].expand_as(value)
    output = method.attend(query, key, constant, layout)
    torch.testing.assert_close(output, constant, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("correction", ["pooled", "centroids"])
def test_blocks_of_equal_tokens_are_estimated_exactly(correction):
    layout = LAYOUTS["6+1x16x8"]
    query, key, value = smooth_tokens(layout)
    method = RectifiedSpaAttn(0.8, block=16, gapr=False, neighbors=False, correction=correction)
    order = 6 + token_order(layout.grid, "hilbert", 16).order
    for tokens in (query, key, value):
        tokens[:, order] = tokens[:, order[::16]].repeat_interleave(16, 1)
    output = method.attend(query, key, value, layout)
    torch.testing.assert_close(
        output.double(), reference.attention(query, key, value)[0], atol=1e-5, rtol=1e-4
    )
    plain = SparseAttn(0.2, block=16, **PLAIN).attend(query, key, value, layout)
    assert (plain - output).norm() > 0.01 * output.norm()


def test_permuting_heads_or_samples_permutes_the_output():
    layout = LAYOUTS["1x7x23+9"]
    tokens = smooth_tokens(layout, batch=3, heads=3)
    turn = torch.tensor([2, 0, 1])
    for method in METHODS:
        output = method.attend(*tokens, layout)
        by_head = method.attend(*(x[:, :, turn] for x in tokens), layout)
        by_sample = method.attend(*(x[turn] for x in tokens), layout)
        torch.testing.assert_close(by_head, output[:, :, turn], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(by_sample, output[turn], atol=1e-6, rtol=1e-5)


def test_permuting_keys_inside_a_block_changes_nothing():
    layout = LAYOUTS["6+1x16x8"]
    query, key, value = smooth_tokens(layout)
    order = 6 + token_order(layout.grid, "hilbert", 16).order
    inside = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = torch.arange(layout.length)
    moved[order] = order.unflatten(0, (-1, 16))[:, inside].flatten()
    for method in (METHODS[0], METHODS[2]):
        before = method.attend(query, key, value, layout)
        after = method.attend(query, key[:, moved], value[:, moved], layout)
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
        rows = method.attend(query[:, moved], key, value, layout)
        torch.testing.assert_close(before[:, moved], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [METHODS[3], METHODS[4], SparseAttn(0.3, selector="pooled", corrector="tail", block=16)],
    ids=["pooled", "centroids", "tail"],
)
def test_one_vector_added_to_all_keys_leaves_the_rectification_unchanged(method):
    layout = LAYOUTS["1x7x23+9"]
    query, key, value = smooth_tokens(layout)
    shift = torch.randn(1, 1, 2, 32, generator=torch.Generator().manual_seed(2))
    before = method.attend(query, key, value, layout)
    after = method.attend(query, key + shift, value, layout)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_gate_that_rejects_everything_leaves_plain_sparse_attention_bit_for_bit():
    """Signs that cancel inside each block give means near 0 and spreads near 1."""
    layout = TokenLayout.image(16, 16)
    query, key, value = smooth_tokens(layout)
    sign = torch.empty(256)
    sign[token_order(layout.grid, "hilbert", 16).order] = torch.tensor([1.0, -1.0]).repeat(128)
    query = query.abs() * sign[:, None, None] + 0.01
    key = key.abs() * sign[:, None, None] + 0.5
    knobs = {"block": 16, "p_remain": 0.3, "neighbors": True, "order": "hilbert"}
    plain = SparseAttn(0.2, **PLAIN, **knobs).attend(query, key, value, layout)
    gated = RectifiedSpaAttn(0.8, **knobs).attend(query, key, value, layout)
    trusting = RectifiedSpaAttn(0.8, gapr=False, **knobs).attend(query, key, value, layout)
    assert torch.equal(plain, gated)
    assert not torch.equal(plain, trusting)


def test_correcting_beats_ignoring_on_smooth_tokens():
    layout = TokenLayout.image(32, 40, text_before=7)
    tokens = smooth_tokens(layout, noise=0.1)
    dense = FullAttn().attend(*tokens, layout)
    knobs = {"block": 16, "p_remain": 0.0, "neighbors": False}

    def error(method):
        return ((method.attend(*tokens, layout) - dense).norm() / dense.norm()).item()

    plain = error(SparseAttn(0.1, **PLAIN, **knobs))
    pooled = error(RectifiedSpaAttn(0.9, **knobs))
    assert pooled < 0.9 * plain
    assert error(RectifiedSpaAttn(0.9, correction="centroids", **knobs)) < 0.6 * pooled
    assert error(RectifiedSpaAttn(0.9, gapr=False, **knobs)) < 0.7 * plain


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_low_precision_costs_no_more_than_its_rounding(method):
    """Same selection as fp32 on the rounded inputs: a changed block would be a large error."""
    layout = LAYOUTS["5+3x5x11+4"]
    tokens = [x.bfloat16() for x in smooth_tokens(layout)]
    low = method.attend(*tokens, layout)
    high = method.attend(*(x.float() for x in tokens), layout)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_two_runs_are_bit_equal_and_the_inputs_stay_untouched(method):
    layout = LAYOUTS["5+3x5x11+4"]
    tokens = smooth_tokens(layout)
    copies = [x.clone() for x in tokens]
    with torch.inference_mode():
        first, second = (method.attend(*tokens, layout) for _ in range(2))
    assert torch.equal(first, second)
    assert all(map(torch.equal, tokens, copies))


def test_autocast_does_not_lower_the_precision_of_the_estimate():
    layout = LAYOUTS["6+1x16x8"]
    tokens = smooth_tokens(layout)
    outside = METHODS[2].attend(*tokens, layout)[:, 6:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = METHODS[2].attend(*tokens, layout)[:, 6:]
    torch.testing.assert_close(inside.float(), outside, atol=2e-2, rtol=2e-2)


def test_transposed_tensors_give_the_same_result():
    layout = LAYOUTS["6+1x16x8"]
    tokens = smooth_tokens(layout)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    for method in METHODS:
        torch.testing.assert_close(
            method.attend(*tokens, layout), method.attend(*strided, layout), atol=1e-6, rtol=1e-5
        )


def test_density_is_the_share_of_pairs_computed():
    layout = TokenLayout.image(16, 16, text_after=64)
    density = SparseAttn(0.25, block=16).attend_with_density(*smooth_tokens(layout), layout)[1]
    assert density.shape == () and density.dtype == torch.float32
    exact = (256 * 64 + 256 * 64 + 64 * 320) / 320**2
    assert float(density) == pytest.approx(exact)


def test_a_step_of_few_rows_gives_the_same_result(monkeypatch):
    layout = LAYOUTS["5+3x5x11+4"]
    tokens = smooth_tokens(layout, batch=2)
    whole = [method.attend(*tokens, layout) for method in METHODS]
    monkeypatch.setattr("diffaccel.methods.block_sparse.estimator._STEP_ELEMENTS", 200)
    for method, expected in zip(METHODS, whole, strict=True):
        torch.testing.assert_close(method.attend(*tokens, layout), expected, atol=1e-6, rtol=1e-5)
