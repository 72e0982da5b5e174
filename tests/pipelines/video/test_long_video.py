"""Windows along time: shares, limits, whole videos."""

from dataclasses import replace

import diffusers
import pytest
import torch

from diffaccel.errors import InputError
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.job import VideoJob
from diffaccel.pipelines.video.long_video import TimeWindows, denoise_windows
from diffaccel.pipelines.video.wan import Conditions


@pytest.mark.parametrize("frames", [1, 5, 21, 22, 40, 61])
@pytest.mark.parametrize("step", [0, 1])
def test_shares_sum_to_one_and_windows_are_native(frames, step):
    total = torch.zeros(frames)
    for window, weights in TimeWindows(21, 8).weights(frames, step):
        assert len(weights) == min(21, frames) and (weights > 0).all()
        total[window] += weights
    torch.testing.assert_close(total, torch.ones(frames))


def test_neighbours_share_frames_and_cuts_move():
    windows = TimeWindows(21, 8)
    starts = windows.starts(60, 0)
    assert starts == [0, 13, 26, 39]
    assert windows.starts(60, 1) == [0, 7, 20, 33, 39]
    assert TimeWindows(21, 8, moves=False).starts(60, 1) == starts


def test_a_window_as_long_as_the_video_is_the_stock_pipeline(video_pipe):
    pipe, embeds = video_pipe()
    job = VideoJob(None, (96, 64), 9, recipe=TimeWindows(), steps=3, seed=4, **embeds)
    result = generate_video(pipe, job)
    stock = pipe(
        **embeds, width=96, height=64, num_frames=9, num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(4), output_type="pt",
    ).frames  # fmt: skip
    torch.testing.assert_close(result.frames, stock, atol=1e-4, rtol=1e-3)


def test_long_videos_in_batches(video_pipe):
    pipe, embeds = video_pipe()
    noise = torch.randn(2, 16, 9, 4, 6, generator=torch.Generator().manual_seed(0))
    text, negative = (embeds[f"{name}prompt_embeds"].repeat(2, 1, 1) for name in ("", "negative_"))
    both = Conditions(text, negative)
    found = denoise_windows(pipe, noise, both, TimeWindows(3, 1), steps=2)
    alone = denoise_windows(pipe, noise, both, TimeWindows(9, 1), steps=2)
    assert found.shape == noise.shape and torch.isfinite(found).all()
    assert not torch.allclose(found, alone, atol=1e-3)


def test_caches_of_the_pipelines_own_calls_are_refused_before_the_run(video_pipe):
    """Windows of one step take turns, two paths double the batch: caches would mix them up."""
    pipe, embeds = video_pipe()
    jobs = [
        VideoJob(None, (96, 64), 9, recipe=TimeWindows(2, 1), steps=2, **embeds),
        VideoJob(None, (96, 64), 9, native=(48, 32), steps=2, **embeds),
        VideoJob(None, (96, 64), 9, native=(96, 64), steps=2, **embeds),
    ]
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    ran = []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    for job in jobs[:2]:
        with pytest.raises(InputError, match=r"first_block_cache cannot follow; .*disable_cache"):
            generate_video(pipe, job)
    assert not ran
    generate_video(pipe, jobs[2])
    assert ran


def test_bad_input_is_refused(video_pipe):
    with pytest.raises(ValueError, match="overlap in 0 to length - 1"):
        TimeWindows(4, 4)
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        TimeWindows(guidance_scale=0.5)
    pipe, embeds = video_pipe(in_channels=36, out_channels=16)
    job = VideoJob(None, (96, 64), 9, recipe=TimeWindows(), **embeds)
    with pytest.raises(InputError, match="36 input channels"):
        generate_video(pipe, job)
    with pytest.raises(InputError, match="got native; leave it out"):
        replace(job, native=(48, 32))
    with pytest.raises(InputError, match="steps must be at least 1"):
        replace(job, steps=0)
