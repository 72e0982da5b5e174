"""What families refuse before any work, and what their sizes do to positions and schedules."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import diffusers
import numpy as np
import pytest
import torch
from tiny_image_pipelines import BUILDERS, autoencoders

from diffaccel.bindings import UnsupportedModelError, binding_of
from diffaccel.errors import InputError
from diffaccel.methods import FullAttn
from diffaccel.pipelines.image.beyond_native import scheduler_for
from diffaccel.pipelines.image.generate import generate_image
from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.presets import BY_PIPELINE, denoiser, preset_for
from diffaccel.pipelines.image.tiling import tiled
from diffaccel.pipelines.redraw.latents import LatentCodec

pytestmark = pytest.mark.usefixtures("one_thread")


def job_of(tiny, recipe="direct", size=None, **changes):
    preset = BY_PIPELINE[type(tiny.pipe).__name__]
    arguments = {**preset.arguments, **tiny.told}
    preset = replace(preset, native=tiny.native, steps=2, arguments=arguments)
    refinement = replace(preset.recipes[recipe].refinement, steps=2, **changes)
    return ImageJob(tiny.prompt, size or tiny.size, preset, FullAttn(), refinement)


def refused(tiny, job, error, words):
    """Checks the message, and that the denoiser never ran."""
    calls = []
    with denoiser(tiny.pipe).register_forward_pre_hook(lambda *_: calls.append(1)):
        with pytest.raises(error, match=words) as told:
            generate_image(tiny.pipe, job)
    assert not calls and "\n" not in str(told.value)


@pytest.mark.parametrize("name", BUILDERS)
def test_positions_are_scaled_for_one_picture_or_refused_by_name(name):
    tiny = BUILDERS[name]()
    model, decode, decoded = denoiser(tiny.pipe), tiny.pipe.vae.decode, []
    tiny.pipe.vae.decode = lambda z, *a, **k: decoded.append(z) or decode(z, *a, **k)
    if not binding_of(model).scales_rope:
        for kind in ("ntk", "yarn"):
            refused(tiny, job_of(tiny, rope=kind), UnsupportedModelError, type(model).__name__)
        return
    for kind in ("plain", "ntk", "yarn", "plain"):
        generate_image(tiny.pipe, job_of(tiny, rope=kind))
    plain, ntk, yarn, again = decoded
    assert torch.equal(plain, again) and torch.isfinite(ntk).all() and torch.isfinite(yarn).all()
    assert not torch.equal(plain, ntk) and not torch.equal(plain, yarn)
    assert not torch.equal(ntk, yarn)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda pipe: setattr(pipe, "scheduler", diffusers.IPNDMScheduler()),
            "able to noise it, and IPNDMScheduler is not",
        ),
        (lambda pipe: setattr(pipe, "vae", None), "this Lumina2Pipeline has none"),
    ],
)
def test_what_cannot_start_from_a_picture_is_refused(change, words):
    tiny = BUILDERS["Lumina2Pipeline"]()
    change(tiny.pipe)
    refused(tiny, job_of(tiny, "cascade"), InputError, words)


def test_a_pipeline_that_makes_its_latents_elsewhere_is_refused(monkeypatch):
    tiny = BUILDERS["Lumina2Pipeline"]()
    monkeypatch.delattr(diffusers.Lumina2Pipeline, "prepare_latents")
    refused(tiny, job_of(tiny, "cascade"), InputError, "in prepare_latents, Lumina2Pipeline does")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("AuraFlowPipeline", 16),
        ("CogView3PlusPipeline", 16),
        ("Lumina2Pipeline", 32),
        ("LuminaPipeline", 384),
        ("ZImagePipeline", 32),
    ],
)
@pytest.mark.parametrize("recipe", ["direct", "cascade"])
def test_sizes_without_positions_are_refused(name, side, recipe):
    tiny = BUILDERS[name]()
    size = ((side + 1) * 16, 64)
    words = rf"at most {side} tokens along a side, {size[0]}x64 needs {side + 1}"
    refused(tiny, job_of(tiny, recipe, size), InputError, words)


def test_hidream_refuses_what_is_not_square_beyond_its_area():
    tiny = BUILDERS["HiDreamImagePipeline"]()
    words = "at most 16 tokens, 160x96 has 60; choose a square"
    refused(tiny, job_of(tiny, "cascade", (160, 96)), InputError, words)


def test_a_scheduler_that_was_not_meant_for_pictures_keeps_its_generator():
    """HunyuanDiT draws noise at each step, from the generator that it is given."""
    tiny = BUILDERS["HunyuanDiTPipeline"]()
    pictures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        result = generate_image(tiny.pipe, job_of(tiny, "guided", strength=1.0))
        pictures.append(np.asarray(result.image))
    assert np.array_equal(*pictures)


def test_the_prior_of_the_native_picture_serves_the_larger_one():
    tiny = BUILDERS["GlmImagePipeline"]()
    seen = []

    def keep(_model, _args, kwargs):
        seen.append(kwargs["prior_token_id"].view(kwargs["hidden_states"].shape[-2] // 2, -1))

    own = tiny.pipe.generate_prior_tokens
    with denoiser(tiny.pipe).register_forward_pre_hook(keep, with_kwargs=True):
        generate_image(tiny.pipe, job_of(tiny, "window", (128, 128)))
    first, last = seen[0], seen[-1]
    assert torch.equal(last, first.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert tiny.pipe.generate_prior_tokens is own


@pytest.mark.parametrize(
    ("name", "shift"),
    [
        ("CogView4Pipeline", 4096**0.5 / 16 * 0.75 + 0.25),
        ("GlmImagePipeline", 4096**0.5 / 16 * 0.75 + 0.25),
        ("HiDreamImagePipeline", 3.0),
        ("ChromaPipeline", 1.0),
        ("Krea2Pipeline", exp(1.15)),
    ],
)
def test_the_shift_at_native_size_is_what_the_pipeline_takes_there(name, shift):
    tiny = BUILDERS[name]()
    for side, factor in ((1024, 1.0), (2048, 2.0)):
        job = replace(job_of(tiny), size=(side, side), preset=BY_PIPELINE[name])
        job = replace(job, refinement=replace(job.refinement, shift="size"))
        config = scheduler_for(tiny.pipe, job).config
        found = config["shift"] if "shift" in config else config["flow_shift"]
        assert found == pytest.approx(shift * factor) and not config.get("use_dynamic_shifting")


FLOWS = ("FlowMatchLCMScheduler", "FlowMatchHeunDiscreteScheduler")


@pytest.mark.parametrize("scheduler", FLOWS)
def test_every_flow_scheduler_takes_the_shift_of_a_recipe(scheduler):
    """HiDream Dev samples with FlowMatchLCMScheduler and shift 6."""
    tiny = BUILDERS["HiDreamImagePipeline"]()
    tiny.pipe.scheduler = getattr(diffusers, scheduler)(shift=6.0)
    job = replace(job_of(tiny, shift="size"), size=(2048, 2048))
    job = replace(job, preset=BY_PIPELINE["HiDreamImagePipeline"])
    found = scheduler_for(tiny.pipe, job)
    assert type(found) is type(tiny.pipe.scheduler) and found.config.shift == 12.0
    found.set_timesteps(4)
    expected = getattr(diffusers, scheduler)(shift=12.0)
    expected.set_timesteps(4)
    assert torch.equal(found.timesteps, expected.timesteps)


@pytest.mark.parametrize("recipe", ["direct", "window", "guided", "cascade"])
def test_hidream_dev_draws_with_every_recipe(recipe):
    tiny = BUILDERS["HiDreamImagePipeline"]()
    tiny.pipe.scheduler = own = diffusers.FlowMatchLCMScheduler(shift=6.0)
    pictures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pictures.append(np.asarray(generate_image(tiny.pipe, job_of(tiny, recipe)).image))
    assert np.array_equal(*pictures) and tiny.pipe.scheduler is own
    if recipe == "guided":
        torch.manual_seed(2)
        free = generate_image(tiny.pipe, job_of(tiny, recipe, guidance=0.0)).image
        assert not np.array_equal(np.asarray(free), pictures[1])


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_the_shift_of_flux2_is_what_it_computes_for_a_redrawing(name):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    preset = BY_PIPELINE[name]
    steps = preset.recipes["window"].refinement.schedule
    assert preset.shift == pytest.approx(exp(compute_empirical_mu(4096, steps)), rel=0.02)


def test_prx_and_pixart_take_their_size_from_what_is_loaded():
    flat, deep = BUILDERS["PRXPipeline"]().pipe, BUILDERS["PRXPipeline:deep"]().pipe
    assert (preset_for(flat, "").token, preset_for(deep, "").token) == (16, 32)
    deep.default_sample_size = 1024
    assert preset_for(deep, "").native == 1024
    pixart = BUILDERS["PixArtSigmaPipeline"]().pipe
    assert preset_for(pixart, "").native == pixart.transformer.config.sample_size * 8


def test_a_codec_wins_over_an_image_to_image_twin(monkeypatch):
    def twin(*_args, **_kwargs):
        raise AssertionError("the image-to-image twin was asked for")

    monkeypatch.setattr(diffusers.AutoPipelineForImage2Image, "from_pipe", twin)
    tiny = BUILDERS["ZImagePipeline"]()
    assert generate_image(tiny.pipe, job_of(tiny, "cascade")).image.size == tiny.size


@pytest.mark.parametrize(
    ("build", "codec"),
    [
        (autoencoders.kl, LatentCodec()),
        (autoencoders.deep, LatentCodec()),
        (autoencoders.flux2, LatentCodec(patches_channels=True)),
        (autoencoders.hunyuan, LatentCodec()),
        (autoencoders.qwen, LatentCodec()),
        (autoencoders.qwen21, LatentCodec()),
        (autoencoders.wan, LatentCodec()),
    ],
)
def test_every_autoencoder_encodes_in_tiles(build, codec):
    vae, kinds = build(4), []
    coarse = torch.rand(1, 3, 5, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, (576, 64), mode="bicubic")
    plain = codec.encode(vae, pixels)
    with tiled(vae, kinds.append):
        found = codec.encode(vae, pixels)
    assert found.shape == plain.shape and kinds.count("encode") > 1
    assert (found - plain).abs().mean() < 0.5 * plain.std()
    assert "tiled_encode" not in vars(vae) and not vae.use_tiling
