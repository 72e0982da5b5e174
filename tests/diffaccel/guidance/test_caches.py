"""Guidance beside diffusers' caches, and beside arguments that models take apart."""

from __future__ import annotations

import diffusers
import pytest
import torch
from cached_pipelines import DIT, PAIRS, Cached

from diffaccel import (
    HeadPerturbation,
    NormalizedAttention,
    SkipLayers,
    set_attn_processor,
    set_guidance,
)
from diffaccel.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")
JOINT = ("flux", "sd3", "qwen", "hunyuan", "cogvideox")
READS_ROWS = ("faster_cache", "first_block_cache", "sea_cache", DIT)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [HeadPerturbation(layers=(1,)), SkipLayers((1,))])
@pytest.mark.parametrize(("name", "cache"), PAIRS)
def test_a_cache_learns_nothing_of_the_damaged_forward(name, cache, damage):
    with Cached(name, cache) as cached:
        cached.enable()
        stock = cached.sample()
        with set_guidance(cached.tiny.pipe, damage, scale=1e-7):
            got = cached.sample()
        assert (got - stock).abs().max() <= 1e-4 * stock.abs().max()
        with set_guidance(cached.tiny.pipe, damage, scale=2.0):
            strong = cached.sample()
        assert strong.isfinite().all() and not torch.equal(strong, stock)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache"), PAIRS)
def test_a_cache_learns_nothing_of_a_negative_prompt(name, cache):
    with Cached(name, cache) as cached:
        cached.enable()
        stock, pipe = cached.sample(), cached.tiny.pipe
        negative = torch.flip(cached.tiny.arguments["prompt_embeds"], (-1,))
        method = NormalizedAttention(torch.cat([negative, negative[:, :3]], 1), limit=1e6)
        if name in JOINT and cache in READS_ROWS:
            with pytest.raises(ModelError, match=f"{cache} cannot follow"):
                set_guidance(pipe, method, scale=1e-7)
            return
        with set_guidance(pipe, method, scale=1e-7) as guidance:
            got = cached.sample()
            report = guidance.report()
        assert (got - stock).abs().max() <= 1e-4 * stock.abs().max()
        assert report.rerun < 1 if name in JOINT else report.rerun == 0
        if name in JOINT:
            with pytest.raises(ModelError, match="guide all steps"):
                set_guidance(pipe, method, scale=1.0, stop=0.5)


def test_a_cache_that_is_enabled_after_guidance_is_refused_before_the_run(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    negative = NormalizedAttention(torch.zeros(1, 3, 32))
    with set_guidance(tiny.pipe, negative, scale=4.0):
        tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
        with pytest.raises(ModelError, match="disable_cache"):
            tiny.sample()


@pytest.mark.parametrize("layer", [0, 3, 6])
@pytest.mark.parametrize("rows", [1, 2])
def test_adapter_features_reach_every_forward(tiny_pipelines, rows, layer):
    """U-Nets pop the features of a T2I-Adapter off the list that they are called with."""
    tiny = tiny_pipelines.sd15()
    model, tiny.pipe._guidance_scale = tiny.pipe.unet, 1.0 if rows == 1 else 7.0
    tiny.pipe.scheduler.set_timesteps(10)
    shapes = ((rows, 8, 18, 30), (rows, 16, 9, 15))
    sample, text = torch.randn(rows, 4, 18, 30), torch.randn(rows, 7, 16)

    def predicted():
        features = [0.5 * torch.ones(shape) for shape in shapes]
        return model(
            sample, torch.tensor(500), text, down_intrablock_additional_residuals=features
        )[0]

    damage = HeadPerturbation(layers=(layer,))
    with torch.no_grad():
        sound = predicted()
        with set_attn_processor(model, damage, always=True):
            damaged = predicted()
        with set_guidance(tiny.pipe, damage, scale=2.0):
            got = predicted()
        delta = 2 * (sound - damaged)[rows // 2 :].repeat(rows, 1, 1, 1)
        torch.testing.assert_close(got, sound + delta, rtol=1e-4, atol=1e-5)
        if rows == 1:
            with set_guidance(tiny.pipe, NormalizedAttention(text), scale=2.0):
                torch.testing.assert_close(predicted(), sound, rtol=1e-4, atol=1e-5)
