"""Which steps run dense, and how much is computed in the others, by the share of the schedule."""

from dataclasses import replace

import pytest
import torch

from diffaccel.layout import TokenLayout
from diffaccel.methods import AgentAttn, ProportionalAttn, RectifiedSpaAttn, SparseAttn
from diffaccel.methods.inputs import AttentionInputs, Position
from diffaccel.methods.published import PUBLISHED
from tests.diffaccel.methods.block_sparse.test_base import smooth_tokens

LAYOUT = TokenLayout.image(16, 24, text_before=5)
PLAIN = {"block": 16, "selector": "pooled", "corrector": "none"}


def dense_steps(method, steps):
    """The steps of a run that run dense."""
    return [
        step
        for step in range(steps)
        if method.schedule_reason(Position(0, step, step / steps, (step + 1) / steps))
    ]


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [
        (0.2, 50, 10), (0.2, 10, 2), (0.2, 9, 1), (0.2, 4, 0), (0.25, 4, 1), (0.5, 4, 2),
        (0.1, 30, 3), (0.3, 10, 3), (0.7, 10, 7), (0.99, 1, 0), (0.99, 200, 198),
    ],
)  # fmt: skip
def test_a_share_of_the_schedule_is_dense(share, steps, expected):
    """Steps that end within the share: of a short run less than the share, never more."""
    method = SparseAttn(dense_steps=share)
    assert dense_steps(method, steps) == list(range(expected))
    late = Position(0, 0, 0.5, 0.5 + 1 / steps)  # image to image begins in the middle
    assert bool(method.schedule_reason(late)) == (share >= 0.5 + 1 / steps)


def test_calls_of_one_step_are_dense_together():
    """Second order: two calls lie in one step, the second one half a step later."""
    method = SparseAttn(dense_steps=0.25)
    calls = [Position(0, n // 2, n / 15, (n // 2 + 1) / 8) for n in range(15)]
    assert [bool(method.schedule_reason(call)) for call in calls] == [True] * 4 + [False] * 11


def test_without_a_number_of_steps_those_that_begin_within_the_share_are_dense():
    tokens, method = smooth_tokens(LAYOUT), SparseAttn(0.3, dense_steps=0.3, block=16)

    def density(**at):
        return float(method.attend_with_density(*tokens, LAYOUT, **at)[1])

    assert density(progress=0.0) == density(progress=0.29) == 1.0
    assert density(progress=0.3) < 1.0 and density() < 1.0 and density(step=0) < 1.0


def test_a_number_of_steps_is_a_number_of_steps():
    for steps in (2, 4, 50):
        assert dense_steps(SparseAttn(dense_steps=3), steps) == list(range(min(3, steps)))


@pytest.mark.parametrize("value", [1.0, 0.0, -0.2, 1.5, -1, "2"])
def test_shares_lie_between_none_and_all(value):
    with pytest.raises(ValueError, match="dense_steps must be"):
        SparseAttn(dense_steps=value)


@pytest.mark.parametrize(
    ("family", "expert", "runs"),
    [
        ("wan2.1-t2v", 0, {None: 5, 50: 5, 100: 5, 40: 4, 20: 2, 10: 1, 9: 0, 4: 0, 1: 0}),
        ("wan2.2-t2v", 0, {None: 3, 40: 3, 50: 3, 20: 1, 8: 0, 4: 0}),
        ("wan2.2-t2v", 1, {None: 1, 40: 1, 39: 0, 4: 0}),
        ("hunyuan", 0, {None: 0, 50: 0, 4: 0}),
    ],
)
def test_published_steps_take_no_larger_share_of_a_shorter_run(family, expert, runs):
    for steps, expected in runs.items():
        for method in (SparseAttn(), ProportionalAttn(SparseAttn()), AgentAttn()):
            resolved = method.resolved(family, 30, expert, steps)
            inner = getattr(resolved, "method", resolved)
            assert inner.dense_steps == expected
        told = SparseAttn(dense_steps=7).resolved(family, 30, expert, steps)
        assert told.dense_steps == 7


def test_published_dense_steps_fit_the_run_they_were_published_for():
    for values in PUBLISHED.values():
        assert all(count <= values.steps for count in values.dense_steps)


@pytest.mark.parametrize(
    ("method", "knob"),
    [
        (SparseAttn(0.6, keep_end=0.2, **PLAIN), "keep"),
        (RectifiedSpaAttn(0.2, drop_end=0.9, block=16, neighbors=False), "drop"),
        (RectifiedSpaAttn(0.9, drop_end=0.2, block=16, neighbors=False), "drop"),
    ],
    ids=["keep", "drop", "more later"],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_density_is_linear_in_the_schedule(method, knob, steps):
    tokens, start = smooth_tokens(LAYOUT), getattr(method, knob)
    end = getattr(method, f"{knob}_end")
    for step in sorted({0, steps // 2, steps - 1}):
        share = round(start + (end - start) * step / steps, 6)
        fixed = replace(method, **{knob: share, f"{knob}_end": None})
        output, density = method.attend_with_density(
            *tokens, LAYOUT, step=step, progress=step / steps
        )
        expected, at_share = fixed.attend_with_density(*tokens, LAYOUT)
        assert torch.equal(output, expected) and float(density) == float(at_share)


def test_density_where_nobody_says_where_a_call_stands_is_that_of_the_start():
    tokens = smooth_tokens(LAYOUT)
    method = SparseAttn(0.6, keep_end=0.2, **PLAIN)
    fixed = SparseAttn(0.6, **PLAIN)
    assert torch.equal(method.attend(*tokens, LAYOUT), fixed.attend(*tokens, LAYOUT))
    assert method.expected_density(LAYOUT) == fixed.expected_density(LAYOUT)


def test_a_step_that_computes_everything_runs_dense_and_says_so():
    tokens = smooth_tokens(LAYOUT)
    inputs = AttentionInputs.checked(*tokens, LAYOUT)
    for inner in (SparseAttn(1.0, keep_end=0.2, **PLAIN),
                  RectifiedSpaAttn(0.0, drop_end=0.8, block=16)):  # fmt: skip
        for method in (inner, ProportionalAttn(inner, train_tokens=LAYOUT.length)):
            first = method.run(inputs, Position(0, 0, 0.0, 0.25))
            assert first.density == 1.0 and first.why_dense
            assert torch.equal(first.output, inputs.dense())
            last = method.run(inputs, Position(0, 3, 0.75, 1.0))
            assert not last.why_dense and float(last.density) < 0.8


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: SparseAttn(keep_end=0.0), "keep_end must lie above 0"),
        (lambda: SparseAttn(keep_end=1.5), "keep_end"),
        (lambda: RectifiedSpaAttn(drop_end=1.0), "drop_end must be at least 0"),
        (lambda: SparseAttn(max_error=0.1, keep_end=0.1), "keep_end None"),
    ],
)
def test_shares_out_of_range_are_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()
