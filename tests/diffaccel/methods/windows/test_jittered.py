"""Jittered windows: borders move with the step, and nothing else changes."""

import pytest
import torch

from diffaccel import JitteredAttn, NeighborhoodAttn, RectifiedSpaAttn, SlidingWindowAttn
from diffaccel.kernels import reference
from diffaccel.layout import TokenLayout

LAYOUT = TokenLayout.image(10, 14, text_before=3)
BLOCKS = SlidingWindowAttn((4, 6), variant="block")


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LAYOUT.length, 2, 16, generator=generator) for _ in range(3)]


def test_borders_move_from_step_to_step_and_runs_agree():
    tokens = drawn()
    method = JitteredAttn(BLOCKS)
    first, second = (method.attend(*tokens, LAYOUT, step=step) for step in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(first, JitteredAttn(BLOCKS).attend(*tokens, LAYOUT, step=0))
    other = JitteredAttn(BLOCKS, seed=1).attend(*tokens, LAYOUT, step=0)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(method.attend(*tokens, LAYOUT), BLOCKS.attend(*tokens, LAYOUT))


@pytest.mark.parametrize(
    "method", [NeighborhoodAttn((4, 6), (3, 4)), BLOCKS, SlidingWindowAttn(5, "tile", tile=3)]
)
@pytest.mark.parametrize("step", [0, 3])
def test_each_step_is_the_windows_with_that_phase(method, step, assert_close_to_oracle):
    tokens = drawn()
    jittered = JitteredAttn(method)
    found = jittered.attend(*tokens, LAYOUT, step=step)
    axes = jittered.at(step).axes(LAYOUT)
    masks = [
        reference.neighborhood_mask(
            axis.length, axis.kernel, axis.stride, axis.dilation, axis.is_causal, axis.phase
        )
        for axis in axes[1:]
    ]
    assert any(axis.phase for axis in axes)
    seen = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    seen[3:, 3:] = torch.kron(*masks)
    expected, _ = reference.attention(*tokens, seen[None, None], None)
    assert_close_to_oracle(found, expected)


def test_windows_that_slide_with_each_query_stay():
    tokens, method = drawn(), NeighborhoodAttn(5)
    assert torch.equal(
        JitteredAttn(method).attend(*tokens, LAYOUT, step=2), method.attend(*tokens, LAYOUT)
    )


def test_the_schedule_of_the_inner_method_holds():
    tokens = drawn()
    method = JitteredAttn(NeighborhoodAttn(4, 4, dense_steps=1))
    output, density = method.attend_with_density(*tokens, LAYOUT, step=0)
    assert density == 1.0
    assert method.attend_with_density(*tokens, LAYOUT, step=1)[1] < 0.5
    assert method.resolved("wan2.1-t2v", 4).method.dense_layers == 2


def test_methods_without_borders_are_refused():
    with pytest.raises(TypeError, match="whose windows have borders"):
        JitteredAttn(RectifiedSpaAttn())
    for knobs in ({"phase": 3}, {"phase": (1, -1)}, {"phase": (1, 2, 3)}):
        with pytest.raises(ValueError, match="phase must be"):
            NeighborhoodAttn(4, 2, **knobs)
        with pytest.raises(ValueError, match="phase must be"):
            SlidingWindowAttn(4, "block", **knobs)
