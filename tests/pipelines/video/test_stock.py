"""Clips beyond native size on stock pipelines other than Wan: latents, and what leads them."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from tiny_clips import CLIPS

from diffaccel.attach.attachment import denoisers
from diffaccel.bindings import binding_of
from diffaccel.errors import InputError
from diffaccel.methods import SlidingWindowAttn
from diffaccel.pipelines.redraw.late_start import pixels_of
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.job import VideoJob

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = FreeSwim(
    steps=4, strength=0.5, guidance_scale=2.0, method=SlidingWindowAttn((1, 3, 3)), guide_every=2
)


QUICK = ("CogVideoXPipeline", "HunyuanVideoPipeline", "LTXPipeline")
ROUNDED = ("AnyFlowPipeline", "LTXPipeline", "MotifVideoPipeline")
"""Make their latents before their schedule, and may round them between."""


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLIPS]
)
def case(request):
    tiny = CLIPS[request.param]()
    return tiny.pipe, tiny.told


def job_of(pipe, told, size, **changes):
    multiple = VIDEO_FAMILIES[type(pipe).__name__].multiple
    embeds = {name: told[name] for name in told if name in VideoJob.__dataclass_fields__}
    others = {name: value for name, value in told.items() if name not in embeds}
    frames = 2 * VIDEO_FAMILIES[type(pipe).__name__].frame_step + 1
    return VideoJob(
        None, tuple(side * multiple for side in size), frames, **embeds, arguments=others,
        steps=2, native=(4 * multiple, 3 * multiple), **{"recipe": FAST, **changes},
    )  # fmt: skip


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
    packed = family.codec.pack(family.codec.normalised(pipe.vae, latents), model)
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
    told = {name: x.to(dtype) if x.is_floating_point() else x for name, x in told.items()}
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
    generate_video(pipe, replace(job, video=clip))
    handle.remove()
    clean = family.codec.encode(pipe.vae, pixels_of(clip.transpose(1, 2), job.size))
    expected = family.codec.pack(clean, model)
    if type(pipe).__name__ == "AnyFlowPipeline":
        expected = expected.transpose(1, 2)
    found = family.codec.part_like(seen[0], expected[:1])[:1].float()
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


def test_windows_along_time_are_refused_by_name(case):
    from diffaccel.pipelines.video.long_video import TimeWindows

    pipe, told = case
    job = replace(job_of(pipe, told, (4, 3)), native=None, recipe=TimeWindows())
    with pytest.raises(InputError, match="windows along time are for Wan"):
        generate_video(pipe, job)
