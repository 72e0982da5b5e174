"""Clips beyond native size on stock pipelines other than Wan: latents, and what leads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_autoencoders import AUTOENCODERS

from diffaccel.errors import InputError
from diffaccel.methods import SlidingWindowAttn
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.job import VideoJob

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = FreeSwim(
    steps=4, strength=0.5, guidance_scale=2.0, method=SlidingWindowAttn((1, 3, 3)), guide_every=2
)


@pytest.fixture(params=["hunyuan", "cogvideox", "ltx"])
def case(request, tiny_pipelines):
    tiny = tiny_pipelines.BUILDERS[request.param]()
    pipe = type(tiny.pipe)(**{**tiny.pipe.components, "vae": AUTOENCODERS[request.param]()})
    pipe.set_progress_bar_config(disable=True)
    keep = {name for name in tiny.arguments if "embeds" in name or "mask" in name}
    told = {name: tiny.arguments[name] for name in keep}
    return pipe, told


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
    packed = family.codec.pack(family.codec.normalised(pipe.vae, seen[0]), pipe.transformer)
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


def test_what_leads_decides_the_picture(case):
    """The full path of cross-attended text, the low frequencies of joint text: both show."""
    pipe, told = case
    led = generate_video(pipe, job_of(pipe, told, (8, 6))).frames
    if type(pipe).__name__ == "LTXPipeline":
        other = job_of(pipe, told, (8, 6), recipe=replace(FAST, guide_every=None))
    else:
        other = job_of(pipe, told, (8, 6), video=torch.rand(1, 9, 3, 48, 64))
    assert not torch.allclose(generate_video(pipe, other).frames, led, atol=1e-4)


def test_windows_along_time_are_refused_by_name(case):
    from diffaccel.pipelines.video.long_video import TimeWindows

    pipe, told = case
    job = replace(job_of(pipe, told, (4, 3)), native=None, recipe=TimeWindows())
    with pytest.raises(InputError, match="windows along time are for Wan"):
        generate_video(pipe, job)
