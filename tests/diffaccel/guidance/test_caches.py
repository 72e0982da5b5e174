"""Guidance beside diffusers' caches, and beside arguments that models take apart."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffaccel import (
    HeadPerturbation,
    NormalizedAttention,
    SkipLayers,
    SparseAttn,
    set_attn_processor,
    set_guidance,
)
from diffaccel.attach.caches import caches_bypassed, caches_of
from diffaccel.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = (
    *("flux", "sd3", "qwen", "wan2.1", "wan2.2", "hunyuan", "cogvideox", "ltx"),
    *("sd15", "sdxl"),
)
JOINT = ("flux", "sd3", "qwen", "hunyuan", "cogvideox")
IDENTIFIERS = ("blocks", "transformer_blocks", "single_transformer_blocks")
STEPS = {"num_inference_steps": 5}


def pyramid(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=IDENTIFIERS,
        current_timestep_callback=lambda: 500,
    )


def faster(pipe):
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=IDENTIFIERS,
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,
        tensor_format="BCFHW",
    )


CACHES = {
    "pyramid_attention_broadcast": pyramid,
    "faster_cache": faster,
    "first_block_cache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "mag_cache": lambda pipe: diffusers.MagCacheConfig(
        mag_ratios=torch.ones(40), num_inference_steps=5, retention_ratio=0.2
    ),
    "taylorseer_cache": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1
    ),
    "sea_cache": lambda pipe: diffusers.SeaCacheConfig(threshold=0.5),
}


def cached(tiny_pipelines, name, cache):
    """A pipeline with a cache, and what it draws; skipped where stock diffusers cannot."""
    tiny = tiny_pipelines.BUILDERS[name]()
    try:
        for model in tiny.denoisers().values():
            apply(model, CACHES[cache](tiny.pipe))
        stock = tiny.sample(**STEPS)
    except Exception as reason:
        pytest.skip(f"stock diffusers: {type(reason).__name__}: {reason}"[:150])
    if caches_of(next(iter(tiny.denoisers().values()))) != {cache}:
        pytest.skip("stock diffusers finds no layer of this family to cache")
    reset(tiny)
    return tiny, stock


def apply(model, config):
    if hasattr(model, "enable_cache"):
        return model.enable_cache(config)
    diffusers.hooks.apply_pyramid_attention_broadcast(model, config)


def reset(tiny):
    for model in tiny.denoisers().values():
        diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [HeadPerturbation(layers=(1,)), SkipLayers((1,))])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_learns_nothing_of_the_damaged_forward(tiny_pipelines, name, cache, damage):
    tiny, stock = cached(tiny_pipelines, name, cache)
    with set_guidance(tiny.pipe, damage, scale=1e-7):
        got = tiny.sample(**STEPS)
    assert (got - stock).abs().max() <= 1e-4 * stock.abs().max()
    reset(tiny)
    with set_guidance(tiny.pipe, damage, scale=2.0):
        strong = tiny.sample(**STEPS)
    assert strong.isfinite().all() and not torch.equal(strong, stock)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_learns_nothing_of_a_negative_prompt(tiny_pipelines, name, cache):
    tiny, stock = cached(tiny_pipelines, name, cache)
    negative = torch.flip(tiny.arguments["prompt_embeds"], (-1,))
    method = NormalizedAttention(torch.cat([negative, negative[:, :3]], 1))
    if name in JOINT and cache in ("faster_cache", "first_block_cache", "sea_cache"):
        with pytest.raises(ModelError, match=f"{cache} cannot tell"):
            set_guidance(tiny.pipe, method, scale=1e-7)
        return
    method = NormalizedAttention(torch.cat([negative, negative[:, :3]], 1), limit=1e6)
    with set_guidance(tiny.pipe, method, scale=1e-7):
        got = tiny.sample(**STEPS)
    assert (got - stock).abs().max() <= 1e-4 * stock.abs().max()
    if name in JOINT:
        with pytest.raises(ModelError, match="guide all steps"):
            set_guidance(tiny.pipe, method, scale=1.0, stop=0.5)


def test_steps_in_which_a_cache_leaves_all_layers_out_are_steps(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    tiny.pipe.transformer.enable_cache(CACHES["mag_cache"](tiny.pipe))
    method = SparseAttn(keep=0.5, block=16, dense_steps=1, dense_layers=0)
    attachment = set_attn_processor(tiny.pipe, method)
    tiny.sample(**STEPS)
    (report,) = attachment.report().denoisers
    calls = sum(sum(layer.dense_calls.values()) + layer.sparse_calls for layer in report.layers)
    assert calls < 5 * len(report.layers), "the cache does nothing here"
    assert report.steps == 5 and report.dense_steps == {0: "dense_steps=1"}


@pytest.mark.parametrize("cache", ["first_block_cache", "pyramid_attention_broadcast"])
def test_a_bypassed_cache_computes_everything_and_comes_back(tiny_pipelines, cache):
    tiny = tiny_pipelines.wan21()
    plain = tiny.sample(**STEPS)
    model = tiny.pipe.transformer
    model.enable_cache(CACHES[cache](tiny.pipe))
    with caches_bypassed(model):
        assert torch.equal(tiny.sample(**STEPS), plain)
    stock = tiny.sample(**STEPS)
    assert not torch.equal(stock, plain)
    reset(tiny)
    with set_guidance(tiny.pipe, HeadPerturbation(layers=(1,)), scale=1e-7):
        assert (tiny.sample(**STEPS) - stock).abs().max() <= 1e-4 * stock.abs().max()


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
