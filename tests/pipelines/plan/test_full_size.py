"""Plans of every denoiser class at its full size, on the meta device, without a weight."""

from __future__ import annotations

import diffusers
import pytest
import torch
from published_sizes import CONFIGURATIONS, PLANS

from diffaccel import RectifiedSpaAttn
from diffaccel.bindings import BINDINGS, binding_of
from diffaccel.pipelines.plan.image import shares_of
from diffaccel.pipelines.plan.memory import tokens_memory
from diffaccel.pipelines.plan.operations import other_flop, served_layers, told_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def full_size(name):
    with torch.device("meta"):
        return getattr(diffusers, name)(**CONFIGURATIONS.get(name, {})).requires_grad_(False)


def test_every_class_has_its_full_size():
    assert set(PLANS) == set(BINDINGS)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.slow
def test_tokens_attention_memory_and_blocks_of_a_full_size_denoiser(name):
    model, expected = full_size(name), PLANS[name]
    layers = told_layers(model, expected.latents, expected.text)
    longest = max(layers, key=lambda served: served.layout.length)
    assert (longest.layout.grid, longest.layout.length) == (expected.grid, expected.length)
    assert len(layers) == expected.layers
    assert (longest.heads, longest.dim) == (expected.heads, expected.dim)
    binding = binding_of(model)
    native = binding.native(model, longest.layer)
    assert native is None or any(served.layout.grid == native for served in layers)
    dense = sum(served.dense_flop for served in layers)
    assert dense >= 4.0 * expected.length**2 * expected.heads * expected.dim
    # Of the widest layer alone: 14 rows of bf16 for each token.
    widest = expected.length * expected.heads * expected.dim
    assert tokens_memory(layers, torch.bfloat16, 1) >= 14 * 2 * widest
    method = RectifiedSpaAttn.published(binding.family(model, None))
    shares, note = shares_of(method, layers, model, None, range(50), "meta", always=True)
    assert 0 < shares.exact <= shares.visited <= 1 and shares.ideal <= shares.visited
    if expected.length > 4000:
        assert shares.exact < 0.9, note


@pytest.mark.parametrize(
    "name", ["HunyuanVideoFramepackTransformer3DModel", "BriaFibo2Transformer2DModel"]
)
@pytest.mark.slow
def test_denoisers_whose_calls_need_values_have_a_plan(name):
    model, expected = full_size(name), PLANS[name]
    layers = served_layers(model, expected.latents, expected.text)
    assert len(layers) == expected.layers
    attention = sum(served.dense_flop for served in layers)
    assert (
        0.05 < attention / (attention + other_flop(model, expected.latents, expected.text)) < 0.95
    )
