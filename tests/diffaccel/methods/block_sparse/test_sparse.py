"""What is special about the default of SparseAttn, and the error that it can promise."""

import pytest
import torch
from block_calls import all_rows, block_call, smooth_tokens

from diffaccel.kernels import reference
from diffaccel.layout import TokenLayout
from diffaccel.methods import RectifiedSpaAttn, SparseAttn
from diffaccel.methods.block_sparse.correctors import CORRECTORS, BlockTail
from diffaccel.methods.block_sparse.selectors import SELECTORS, ExpectedError
from diffaccel.methods.inputs import AttentionInputs, Position

LAYOUT = TokenLayout.image(24, 31, text_before=5)


def tokens(layout=LAYOUT, batch=1, seed=0, noise=0.3):
    return smooth_tokens(layout, batch, heads=3, seed=seed, noise=noise, smooth=1.5)


def error(method, inputs, layout=LAYOUT):
    exact = reference.attention(*inputs)[0][:, layout.visual_slice]
    output = method.attend(*inputs, layout)[:, layout.visual_slice].double()
    return float((output - exact).norm() / exact.norm())


def test_the_expected_error_equals_its_formula():
    call = block_call(0.7, tokens=111)
    score = ExpectedError().score(all_rows(call))
    visual, probability = call.visual, all_rows(call).probability
    for b, h, n, m in [(0, 0, 0, 1), (1, 1, 6, 2), (0, 1, 3, 3), (1, 0, 2, 6)]:
        query, key, value = (
            x[b, 16 * i : 16 * i + 16, h].double()
            for x, i in ((visual.query, n), (visual.key, m), (visual.value, m))
        )
        power = query.square().mean(0)  # mean squared + variance
        variance = key.var(0, unbiased=False)
        deviation = (value - value.mean(0)).square().sum(-1).mean().sqrt()
        exponent = min(4.0, float((power * variance).sum()) * visual.scale**2)
        expected = probability[b, h, n, m] * (torch.tensor(exponent).exp() - 1).sqrt() * deviation
        torch.testing.assert_close(score[b, h, n, m], expected.float(), rtol=1e-4, atol=1e-7)


def test_alike_tokens_are_worth_nothing():
    assert (ExpectedError().score(all_rows(block_call(0.0))) < 1e-5).all()


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout.video(5, 9, 13, text_after=7)])
@pytest.mark.parametrize("keep", [0.1, 0.25])
def test_the_default_errs_less_than_all_that_came_before(layout, keep):
    inputs = tokens(layout)
    plain = {"selector": "pooled", "block": 32, "order": "brick"}
    ours = error(SparseAttn(keep, block=32, order="brick"), inputs, layout)
    for other in (
        SparseAttn(keep, corrector="none", **plain),
        SparseAttn(keep, corrector=BlockTail(), **plain),
        SparseAttn(keep, corrector="normaliser", **plain),
        RectifiedSpaAttn(1 - keep, p_remain=0.0, neighbors=False, block=32, order="brick"),
    ):
        assert ours < 0.9 * error(other, inputs, layout), other


def test_density_is_what_was_asked_for():
    for keep in (0.05, 0.1, 0.3, 0.7):
        method = SparseAttn(keep, block=32)
        density = method.attend_with_density(*tokens(), LAYOUT)[1]
        expected = method.expected_density(LAYOUT)
        # Each row keeps its own block and another; blocks are whole.
        assert abs(float(density) - expected) < 0.02 or keep == 0.05
        assert float(density) >= expected - 0.02


def test_names_and_objects_mean_the_same():
    named = SparseAttn(0.2, block=32, selector="expected-error", corrector="value")
    built = SparseAttn(
        0.2, block=32, selector=ExpectedError(), corrector=CORRECTORS["value"], budget="mixed"
    )
    inputs = tokens()
    assert torch.equal(named.attend(*inputs, LAYOUT), built.attend(*inputs, LAYOUT))
    assert eval(repr(SparseAttn())) == SparseAttn()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_everything_kept_is_dense_and_constants_stay(selector, corrector):
    inputs = tokens()
    method = SparseAttn(selector=selector, corrector=corrector, p_remain=1.0, block=32)
    assert error(method, inputs) < 2e-3  # a block without measurable mass may be left out
    query, key, value = inputs
    method = SparseAttn(0.2, selector=selector, corrector=corrector, block=32)
    constant = value[:, :1, :1].expand_as(value)
    output = method.attend(query, key, constant, LAYOUT)
    torch.testing.assert_close(output, constant, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_near(dtype):
    inputs = tokens()
    method = SparseAttn(0.2, block=32)
    exact = method.attend(*inputs, LAYOUT)
    output = method.attend(*(x.to(dtype) for x in inputs), LAYOUT)
    assert output.dtype == dtype
    distance = float((output.float() - exact).norm() / exact.norm())
    assert distance < {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 1e-4}[dtype]


@pytest.mark.parametrize("max_error", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("corrector", ["value", "output", "none"])
def test_a_promised_error_holds_and_is_measured(max_error, corrector):
    for seed in range(3):
        inputs = tokens(seed=seed, batch=2)
        method = SparseAttn(max_error=max_error, block=32, corrector=corrector)
        attended = method.run(AttentionInputs.checked(*inputs, LAYOUT), Position())
        true = error(method, inputs)
        assert true <= max_error, (seed, true)
        assert abs(float(attended.error) - true) < 0.35 * max_error


def test_a_looser_promise_computes_less():
    inputs = tokens()
    densities = [
        float(SparseAttn(max_error=bound, block=32).attend_with_density(*inputs, LAYOUT)[1])
        for bound in (0.001, 0.02, 0.1, 0.4)
    ]
    assert densities == sorted(densities, reverse=True) and densities[0] > densities[-1]


def test_a_promise_that_takes_everything_runs_dense_and_says_so():
    inputs = tokens(noise=3.0)
    method = SparseAttn(max_error=0.001, block=32)
    attended = method.run(AttentionInputs.checked(*inputs, LAYOUT), Position())
    assert "promised error" in attended.why_dense and attended.density == 1.0
    assert error(method, inputs) < 1e-5


def test_promises_hold_for_padded_tokens_whatever_they_hold():
    layout = TokenLayout.image(24, 31, text_after=8)
    query, key, value = tokens(layout)
    mask = torch.ones(1, layout.length, dtype=torch.bool)
    mask[:, 600:744] = False
    found = []
    for filling in (0.0, float("nan")):
        inputs = [x.masked_fill(~mask[..., None, None], filling) for x in (query, key, value)]
        found.append(
            SparseAttn(max_error=0.05, block=32).attend(*inputs, layout, key_padding_mask=mask)
        )
    torch.testing.assert_close(found[0][mask], found[1][mask], atol=1e-5, rtol=1e-5)
    exact = reference.attention(query, key, value, mask[:, None, None])[0][mask]
    assert float((found[0][mask] - exact).norm() / exact.norm()) < 0.05


def test_numbers_that_are_not_finite_stay_visible():
    query, key, value = tokens()
    key[0, 100, 1] = float("nan")
    for method in (SparseAttn(0.2, block=32), SparseAttn(max_error=0.1, block=32)):
        output = method.attend(query, key, value, LAYOUT)
        assert output[0, LAYOUT.visual_slice, 1].isnan().any()
        assert output[0, :, 0].isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"selector": "best"}, "selector must be a Selector or one of expected-error, pooled"),
        ({"corrector": 3}, "corrector must be a Corrector or one of none, pooled"),
        ({"budget": "huge"}, "budget must be a Budget or one of row, mixed"),
        ({"max_error": 0.0}, "max_error must lie above 0 and below 1"),
        ({"max_error": 0.1, "corrector": "tail"}, "max_error needs a corrector"),
        ({"max_error": 0.1, "budget": "mass"}, "max_error needs a budget"),
    ],
)
def test_wrong_parts_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        SparseAttn(**knobs)
