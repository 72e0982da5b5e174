"""Methods and guidance where a ControlNet, a T2I-Adapter or FreeU steers the denoiser."""

from __future__ import annotations

import warnings

import pytest
import torch
from controlled_pipelines import BUILDERS

from diffaccel import (
    FullAttn,
    HeadPerturbation,
    NormalizedAttention,
    PermuteTokens,
    SkipLayers,
    SparseAttn,
    set_attn_processor,
    set_guidance,
)

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
QUICK = ("sd15", "flux", "sd3", "qwen", "sd15 adapter")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in BUILDERS]
DENSELY = "the method computes this shape densely"


def sampled(tiny, **changes):
    """Latents; some pipelines encode the picture that steers with noise of their own."""
    torch.manual_seed(0)
    return tiny.sample(**changes)


def check_guidance_of_no_strength(tiny, stock):
    """Guidance whose scale is next to nothing changes nothing, and runs in all steps."""
    text = torch.zeros_like(tiny.arguments["prompt_embeds"])
    kinds = [kind((1,)) for kind in (SkipLayers, PermuteTokens)]
    kinds += [HeadPerturbation(layers=(1,)), NormalizedAttention(text, limit=1e6)]
    for kind in kinds:
        with set_guidance(tiny.pipe, kind, scale=1e-7) as guidance:
            off = (sampled(tiny) - stock).abs().max()
            assert off <= 1e-5 * stock.abs().max(), kind
            assert guidance.report().guided_steps == guidance.report().steps > 0
    assert torch.equal(sampled(tiny), stock)


def check_method(tiny, stock):
    """A method serves all layers of the denoiser, and leaves no trace; returns its latents."""
    with set_attn_processor(tiny.pipe, FullAttn()):
        assert torch.equal(sampled(tiny), stock)
    with set_attn_processor(tiny.pipe, METHOD, always=True) as attachment:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(ran dense|no longer serves)")
            sparse = sampled(tiny)
        assert sparse.isfinite().all() and not torch.equal(sparse, stock)
        layers = attachment.report().layers
        assert any(layer.sparse_calls for layer in layers)
        assert all(layer.sparse_calls or {*layer.dense_calls} == {DENSELY} for layer in layers)
    assert torch.equal(sampled(tiny), stock)
    return sparse


@pytest.mark.parametrize("name", NAMES)
def test_methods_and_guidance_beside_networks_that_steer(name):
    tiny = BUILDERS[name]()
    key = "control_image" if "control_image" in tiny.arguments else "image"
    steered_otherwise = {key: _blank(tiny.arguments[key])}
    stock = sampled(tiny)
    assert not torch.equal(sampled(tiny, **steered_otherwise), stock)
    sparse = check_method(tiny, stock)
    net = getattr(tiny.pipe, "controlnet", None)
    modules = [] if net is None else list(net.modules())
    with set_attn_processor(tiny.pipe, METHOD, always=True):
        assert not torch.equal(sampled(tiny, **steered_otherwise), sparse)
        for module in modules:  # the network that steers keeps its own attention
            assert "Attached" not in type(getattr(module, "processor", None)).__name__
    check_guidance_of_no_strength(tiny, stock)


def _blank(picture):
    return [_blank(x) for x in picture] if isinstance(picture, list) else torch.zeros_like(picture)


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_methods_and_guidance_beside_freeu(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    plain, settings = sampled(tiny), {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    tiny.pipe.enable_freeu(**settings)
    stock = sampled(tiny)
    assert not torch.equal(stock, plain)
    sparse = check_method(tiny, stock)
    check_guidance_of_no_strength(tiny, stock)
    tiny.pipe.disable_freeu()
    with set_attn_processor(tiny.pipe, METHOD, always=True):
        without = sampled(tiny)
        tiny.pipe.enable_freeu(**settings)
        assert torch.equal(sampled(tiny), sparse)
        tiny.pipe.disable_freeu()
        assert torch.equal(sampled(tiny), without) and not torch.equal(without, sparse)
    assert torch.equal(sampled(tiny), plain)
