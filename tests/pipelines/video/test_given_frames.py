"""Clips that start from a picture, beyond native size: the picture stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tiny_clips import CLIPS, GIVEN, job_of

from diffaccel.errors import InputError
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.long_video import TimeWindows
from diffaccel.pipelines.video.stock import codec_of

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(size):
    pixels = torch.rand(size[1] // 8, size[0] // 8, 3, generator=torch.Generator().manual_seed(5))
    return Image.fromarray((pixels * 255).byte().numpy()).resize(size)


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name == "LTXImageToVideoPipeline" else pytest.mark.slow)
        for name in GIVEN
    ]
)
def case(request, monkeypatch):
    # pipelines draw from the posterior of the picture: its mode can be compared
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    tiny = GIVEN[request.param]()
    return tiny.pipe, tiny.told


def test_the_first_frame_is_the_picture_at_the_larger_size(case):
    pipe, told = case
    name, decoded, seen = type(pipe).__name__, [], []
    family = VIDEO_FAMILIES[name]
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *a, **k: decoded.append(z) or decode(z, *a, **k)
    pipe.transformer.register_forward_pre_hook(
        lambda model, args, call: seen.append(call["hidden_states"]), with_kwargs=True
    )
    job = job_of(pipe, told, (8, 6), image=picture((8 * family.multiple, 6 * family.multiple)))
    if name == "Kandinsky5I2VPipeline":  # which evens the first four latent frames out
        job = job_of(pipe, told, (8, 6), image=job.image, frames=25)
    result = generate_video(pipe, job)
    assert result.frames.shape[1:] == (job.frames, 3, job.size[1], job.size[0])

    codec = codec_of(pipe, family)
    pixels = pipe.video_processor.preprocess(job.image, height=job.size[1], width=job.size[0])
    given = codec.encode(pipe.vae, pixels[:, :, None].float())
    if name == "CogVideoXImageToVideoPipeline":
        found = seen[-1][:1, :1, 4:].transpose(1, 2)
    elif name == "SkyReelsV2ImageToVideoPipeline":
        found = seen[-1][:1, 20:, :1]
    elif name == "Kandinsky5I2VPipeline":
        found = seen[-1][:1, :1, ..., :4].movedim(-1, 1)
    else:
        found = codec.normalised(pipe.vae, decoded[-1])[:, :, :1]
    torch.testing.assert_close(found, given, rtol=1e-3, atol=1e-3)


def test_windows_along_time_are_refused(case):
    pipe, told = case
    job = job_of(pipe, told, (4, 3), arguments={"image": picture((64, 48))})
    with pytest.raises(InputError, match="belongs to one window alone"):
        generate_video(pipe, replace(job, native=None, recipe=TimeWindows()))


def test_a_pipeline_that_holds_frames_by_velocities_is_refused():
    tiny = CLIPS["Cosmos2_5_PredictBasePipeline"]()
    job = job_of(tiny.pipe, tiny.told, (8, 6), image=picture((128, 96)))
    with pytest.raises(InputError, match="velocities from pure noise"):
        generate_video(tiny.pipe, job)
