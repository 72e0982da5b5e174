"""Every family that redraws through a codec: latents, recipes, calls, and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image_pipelines import BUILDERS

from diffaccel.methods.windows.sliding import SlidingWindowAttn
from diffaccel.pipelines.image.generate import generate_image, refine_image
from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.presets import BY_PIPELINE, denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
CODED = {name: preset for name, preset in BY_PIPELINE.items() if preset.codec is not None}


@pytest.fixture(params=BUILDERS)
def tiny(request):
    return BUILDERS[request.param]()


def preset_of(tiny):
    """The family's own, at a tiny native size."""
    preset = BY_PIPELINE[type(tiny.pipe).__name__]
    arguments = {**preset.arguments, **tiny.told}
    return replace(preset, native=tiny.native, steps=2, arguments=arguments)


def job_of(tiny, recipe, method=None, **changes):
    preset = preset_of(tiny)
    refinement = replace(preset.recipes[recipe].refinement, steps=2, **changes)
    method = method or SlidingWindowAttn(3)
    return ImageJob(tiny.prompt, tiny.size, preset, method, refinement, seed=3)


def public(pipe):
    """Attributes but for what a call notes."""
    return {name: id(value) for name, value in vars(pipe).items() if name[0] != "_"}


def pixels(result):
    return np.asarray(result.image)


def test_every_family_with_a_codec_is_built_here():
    assert {name.split(":")[0] for name in BUILDERS} == set(CODED)


def test_the_codec_undoes_what_the_pipeline_does_before_it_decodes(tiny):
    pipe, codec = tiny.pipe, preset_of(tiny).codec
    decoded, stepped, decode, step = [], [], pipe.vae.decode, pipe.scheduler.step

    def stepping(*args, **kwargs):
        output = step(*args, **kwargs)
        stepped.append(output[0])
        return output

    stepping.__signature__ = inspect.signature(step)
    pipe.vae.decode = lambda z, *a, **k: decoded.append(z) or decode(z, *a, **k)
    pipe.scheduler.step = stepping
    generate_image(pipe, replace(job_of(tiny, "cascade"), size=(tiny.native, tiny.native)))
    (latents,) = decoded
    latents = latents[:, :, 0] if latents.ndim == 5 else latents  # a video of one frame
    packed = codec.pack(codec.normalised(pipe.vae, latents), denoiser(pipe))
    torch.testing.assert_close(
        packed.reshape(stepped[-1].shape), stepped[-1], rtol=1e-4, atol=1e-4
    )
    assert packed.squeeze().shape == stepped[-1].squeeze().shape


@pytest.mark.parametrize("recipe", ["direct", "cascade"])
def test_a_picture_twice_as_large_is_drawn_and_the_pipeline_is_left_alone(tiny, recipe):
    pipe = tiny.pipe
    own = public(pipe)
    result = generate_image(pipe, job_of(tiny, recipe))
    assert result.image.size == tiny.size and result.image.mode == "RGB"
    assert len(result.stages) == (1 if recipe == "direct" else 2)
    (report,) = result.reports.values()
    layers = report.denoisers[0].layers
    kinds = {part.kind for x in layers if x.layout for part in x.layout.segments}
    assert ("text" in kinds) == (job_of(tiny, recipe).preset.text > 0)
    if type(pipe).__name__ == "ChromaPipeline":  # adds its mask to the scores
        assert all("is not key padding" in reason for x in layers for reason in x.dense_calls)
    else:
        assert report.density < 1.0 and all(x.sparse_calls and not x.dense_calls for x in layers)
    after = public(pipe)
    assert {name: after[name] for name in own} == own and "prepare_latents" not in after
    assert np.array_equal(pixels(generate_image(pipe, job_of(tiny, recipe))), pixels(result))


def test_redrawing_almost_nothing_gives_the_latents_of_the_picture(tiny):
    pipe, decoded, decode = tiny.pipe, [], tiny.pipe.vae.decode
    picture = np.random.default_rng(0).integers(255, size=(4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(picture).resize(tiny.size, Image.Resampling.BICUBIC)
    pipe.vae.decode = lambda z, *a, **k: decoded.append(z) or decode(z, *a, **k)
    job = job_of(tiny, "window", strength=0.004, shift=None)
    refine_image(pipe, replace(job, refinement=replace(job.refinement, steps=1)), image)
    codec, given = job.preset.codec, torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
    clean = codec.encode(pipe.vae, given[None].float() / 127.5 - 1)
    found = codec.normalised(pipe.vae, decoded[0]).reshape(clean.shape)
    distance = (found - clean).pow(2).mean().sqrt()
    assert distance < 0.5 * (clean - clean.mean()).pow(2).mean().sqrt(), distance


def test_low_frequencies_of_the_smaller_picture_decide_the_larger_one(tiny):
    window, guided = (
        pixels(generate_image(tiny.pipe, job_of(tiny, recipe, strength=0.5)))
        for recipe in ("window", "guided")
    )
    assert not np.array_equal(window, guided)


def test_passes_and_steps_are_those_of_the_pipeline(tiny):
    """Counted: rows of the denoiser for each step of one picture."""
    preset, pipe, rows = preset_of(tiny), tiny.pipe, []
    arguments = inspect.signature(type(pipe).__call__).parameters
    assert BY_PIPELINE[type(pipe).__name__].steps == arguments["num_inference_steps"].default

    def count(_model, args, kwargs):
        latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        rows.append(len(latents))

    with denoiser(pipe).register_forward_pre_hook(count, with_kwargs=True):
        generate_image(pipe, replace(job_of(tiny, "window"), size=(tiny.native, tiny.native)))
    assert sum(rows) == preset.passes * preset.steps == preset.refine_passes * preset.steps
