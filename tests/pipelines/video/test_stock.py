"""Clips beyond native size on stock pipelines other than Wan: latents, and what leads them."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from tiny_clips import CLIPS, FAST, job_of

from diffaccel.attach.attachment import denoisers
from diffaccel.bindings import binding_of
from diffaccel.errors import InputError
from diffaccel.pipelines.redraw.late_start import pixels_of
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.generate import generate_video, guidance_of
from diffaccel.pipelines.video.long_video import TimeWindows
from diffaccel.pipelines.video.stock import codec_of

pytestmark = pytest.mark.usefixtures("one_thread")


QUICK = ("CogVideoXPipeline", "HunyuanVideoPipeline", "LTXPipeline")
ROUNDED = ("AnyFlowPipeline", "LTXPipeline", "MotifVideoPipeline")
"""Make their latents before their schedule, and may round them between."""


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLIPS]
)
def case(request):
    tiny = CLIPS[request.param]()
    return tiny.pipe, tiny.told


def test_the_codec_undoes_what_the_pipeline_does_before_it_decodes(case):
    pipe, told = case
    family, seen = VIDEO_FAMILIES[type(pipe).__name__], []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *a, **k: seen.append(z) or decode(z, *a, **k)
    call = told | {
        "height": 3 * family.multiple, "width": 4 * family.multiple, "num_inference_steps": 2,
        "num_frames": 2 * family.frame_step + 1,
    }  # fmt: skip
    run = {
        kind: pipe(**call, output_type=kind, generator=torch.Generator().manual_seed(0)).frames
        for kind in ("latent", "pt")
    }
    assert run["pt"].shape[-2:] == (3 * family.multiple, 4 * family.multiple)
    (model,) = denoisers(pipe).values()
    latents = torch.cat(seen)
    if latents.ndim == 4:  # decoded frame by frame
        latents = latents.unflatten(0, (1, -1)).transpose(1, 2)
    codec = codec_of(pipe, family)
    packed = codec.pack(codec.normalised(pipe.vae, latents), model)
    if type(pipe).__name__ == "LTX2Pipeline":  # which returns what it decodes
        statistics = pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor
        run["latent"] = pipe._pack_latents(pipe._normalize_latents(run["latent"], *statistics))
    torch.testing.assert_close(packed, run["latent"], rtol=1e-4, atol=1e-4)


def test_a_clip_is_refined_at_a_larger_size_and_the_pipeline_is_left_alone(case):
    pipe, told = case
    before = pipe.scheduler
    job = job_of(pipe, told, (8, 6))
    result = generate_video(pipe, job)
    assert result.frames.shape == (1, job.frames, 3, job.size[1], job.size[0])
    assert torch.isfinite(result.frames).all()
    assert result.native == (job.size[0] // 2, job.size[1] // 2)
    (report,) = result.reports.values()
    assert report.density < 1.0 and all(x.sparse_calls for x in report.denoisers[0].layers)
    assert pipe.scheduler is before and "prepare_latents" not in vars(pipe)
    assert torch.equal(generate_video(pipe, job).frames, result.frames)


def test_a_cascade_passes_through_sizes_between(case):
    pipe, told = case
    job = job_of(pipe, told, (12, 9), recipe=replace(FAST, max_upscale=2.0))
    result = generate_video(pipe, job)
    assert len(result.reports) == 2 and result.frames.shape[-1] == job.size[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_starts_from_the_clip_and_not_from_noise(case, dtype):
    """Of the last of many steps the model sees almost the clip, in every precision."""
    pipe, told = case
    if dtype == torch.bfloat16 and type(pipe).__name__ not in ROUNDED:
        pytest.skip("its latents are what the schedule noises")
    told = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in told.items()
    }
    (model,) = denoisers(pipe).values()
    kept = model._keep_in_fp32_modules or ()
    for name, weight in model.named_parameters():  # the autoencoder would take long
        if not any(part in name for part in kept):
            weight.data = weight.data.to(dtype)
    family = VIDEO_FAMILIES[type(pipe).__name__]
    recipe = replace(FAST, steps=200, strength=0.005, shift=1.0, guide_every=None)
    job = job_of(pipe, told, (8, 6), recipe=recipe)
    clip = torch.rand(1, job.frames, 3, job.native[1], job.native[0])
    seen = []

    def see(model, args, kwargs):
        call = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        seen.append(call[binding_of(model).latents])

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    sound = {"audio_latents": torch.randn(1, 2, 18, 2)} if hasattr(pipe, "audio_vae") else {}
    generate_video(pipe, replace(job, video=clip, arguments=job.arguments | sound))
    handle.remove()
    clean = codec_of(pipe, family).encode(pipe.vae, pixels_of(clip.transpose(1, 2), job.size))
    expected = family.codec.pack(clean, model)
    if type(pipe).__name__ == "AnyFlowPipeline":
        expected = expected.transpose(1, 2)
    found = family.codec.part_like(seen[0], expected[:1])[:1].float()
    if type(pipe).__name__ == "CosmosTextToWorldPipeline":  # its model sees all at unit variance
        found = found * pipe.scheduler.config.sigma_data
    noise = found - expected
    assert noise.std() < 0.15 * max(1.0, expected.std()), noise.std()


def test_what_leads_decides_the_picture(case):
    """The full path of cross-attended text, the low frequencies of joint text: both show."""
    pipe, told = case
    led = generate_video(pipe, job_of(pipe, told, (8, 6))).frames
    (model,) = denoisers(pipe).values()
    if binding_of(model).text_layers(model):
        other = job_of(pipe, told, (8, 6), recipe=replace(FAST, guide_every=None))
    else:
        job = job_of(pipe, told, (8, 6))
        small = torch.rand(1, job.frames, 3, job.native[1], job.native[0])
        other = replace(job, video=small)
    assert not torch.allclose(generate_video(pipe, other).frames, led, atol=1e-4)


def windowed(pipe, told, **windows):
    job = replace(job_of(pipe, told, (4, 3)), native=None)
    family = VIDEO_FAMILIES[type(pipe).__name__]
    frames = 4 * family.frame_step + 1
    return replace(job, frames=frames, recipe=TimeWindows(guidance_scale=2.0, **windows))


def test_windows_along_time(case):
    """As long as the clip they are the stock pipeline, shorter ones are all the model sees."""
    pipe, told = case
    family = VIDEO_FAMILIES[type(pipe).__name__]
    if isinstance(family.windows, str):
        with pytest.raises(InputError, match="windows along time do not suit"):
            generate_video(pipe, windowed(pipe, told))
        return
    (model,) = denoisers(pipe).values()
    seen, forward = [], model.forward
    (layer, *_) = binding_of(model).layers(model)
    handle = model.get_submodule(layer.name).register_forward_pre_hook(
        lambda module, args, call: seen.append((args or tuple(call.values()))[0].shape),
        with_kwargs=True,
    )
    whole = generate_video(pipe, windowed(pipe, told, length=5, overlap=2))
    job = windowed(pipe, told)
    stock = pipe(
        **told, **guidance_of(pipe, job.recipe), height=job.size[1], width=job.size[0],
        num_frames=job.frames, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(job.seed),
    ).frames  # fmt: skip
    assert torch.equal(whole.frames, stock.float())
    long = set(seen)
    seen.clear()
    short = generate_video(pipe, windowed(pipe, told, length=3, overlap=1))
    handle.remove()
    assert short.frames.shape == whole.frames.shape and short.frames.isfinite().all()
    assert not torch.allclose(short.frames, whole.frames, atol=1e-4)
    assert max(map(math.prod, seen)) < max(map(math.prod, long))
    assert model.forward == forward and "forward" not in vars(model)


@pytest.mark.slow
def test_sound_starts_from_the_sound_of_the_smaller_clip():
    tiny = CLIPS["LTX2Pipeline"]()
    pipe = tiny.pipe
    job = job_of(pipe, tiny.told, (8, 6))
    recipe = replace(FAST, steps=200, strength=0.005, shift=1.0)
    decoded = []
    decode = pipe.audio_vae.decode
    pipe.audio_vae.decode = lambda z, *a, **k: decoded.append(z) or decode(z, *a, **k)
    result = generate_video(pipe, replace(job, recipe=recipe))
    assert result.audio.shape[:2] == (1, 2) and result.audio.isfinite().all()
    assert result.sampling_rate == 24000
    assert "prepare_audio_latents" not in vars(pipe)
    small, large = decoded
    assert small.shape == large.shape
    assert (small - large).std() < 0.1 * small.std()


def test_a_given_clip_needs_its_sound():
    tiny = CLIPS["LTX2Pipeline"]()
    job = replace(job_of(tiny.pipe, tiny.told, (8, 6)), video=torch.rand(1, 17, 3, 96, 128))
    with pytest.raises(InputError, match="together with its sound"):
        generate_video(tiny.pipe, job)
