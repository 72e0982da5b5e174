"""FreeSwim on tiny Wan models: the two paths, their cache, the recipe, whole videos."""

from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

from diffaccel import SlidingWindowAttn
from diffaccel.bindings.rope import Linear, Riflex
from diffaccel.errors import InputError
from diffaccel.pipelines.embedded import EMBEDDED_VIDEO
from diffaccel.pipelines.video.dual_path import DualPath
from diffaccel.pipelines.video.freeswim import FreeSwim, refine_latents
from diffaccel.pipelines.video.generate import generate_video, native_size
from diffaccel.pipelines.video.job import VideoJob
from diffaccel.pipelines.video.presets import EMBEDDED_VIDEO_PRESET, WAN, video_preset
from diffaccel.pipelines.video.wan import Conditions, shifted_scheduler

WHOLE = SlidingWindowAttn(99)
SMALL = SlidingWindowAttn((3, 3))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tiny_pipelines):
    return tiny_pipelines.wan21().pipe.transformer


def call_of(batch=1, seed=0):
    return {
        "hidden_states": random(batch, 16, 3, 8, 12, seed=seed),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": random(batch, 16, 32, seed=seed + 1),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_with_a_window_as_large_as_the_grid_both_paths_are_the_model(model, batch):
    call = call_of(batch)
    with torch.no_grad():
        stock = model(**call, return_dict=False)[0]
        with DualPath(model, WHOLE) as paths:
            for found in (
                paths.guided("a", **call),
                paths.reused("a", **call),
                paths.alone(**call),
            ):
                torch.testing.assert_close(found, stock, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(**call, return_dict=False)[0], stock)


@torch.no_grad()
def test_the_full_path_reaches_the_windows_through_cross_attention_alone(model):
    call = call_of()
    with DualPath(model, SMALL) as paths:
        guided, alone = paths.guided("a", **call), paths.alone(**call)
        reused = paths.reused("a", **call)
        torch.testing.assert_close(reused, guided, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(guided, alone, atol=1e-4)
        for block in model.blocks:  # a value of no influence, so that there is no way left
            block.attn2.to_out[0].weight.zero_()
        torch.testing.assert_close(paths.guided("a", **call), paths.alone(**call))


@torch.no_grad()
def test_reuse_runs_one_row_and_other_prompts_keep_their_own(model):
    first, second = call_of(), call_of(seed=5)
    rows = []
    hook = model.blocks[0].register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    with DualPath(model, SMALL) as paths:
        a, b = paths.guided("a", **first), paths.guided("b", **second)
        torch.testing.assert_close(paths.reused("a", **first), a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(paths.reused("b", **second), b, atol=1e-5, rtol=1e-4)
        assert rows == [2, 2, 1, 1]
        tokens, width, layers = 3 * 4 * 6, 24, 2
        assert paths.store.nbytes == 2 * layers * tokens * width * 4
    hook.remove()
    assert paths.store.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("cache", ["offload", "int8"])
def test_other_caches(model, cache):
    call = call_of()
    with DualPath(model, SMALL, cache) as paths:
        guided, reused = paths.guided("a", **call), paths.reused("a", **call)
        if cache == "offload":
            torch.testing.assert_close(guided, reused, atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(guided, reused, atol=2e-2, rtol=2e-2)
            assert not torch.allclose(guided, reused, atol=1e-6)
            assert paths.store.nbytes == 2 * 72 * (24 + 2 * 4)
    with pytest.raises(ValueError, match="cache must be one of keep, offload, int8"):
        DualPath(model, SMALL, "disk")


@torch.no_grad()
def test_an_exception_leaves_the_stock_model(model):
    call = call_of()
    stock = model(**call, return_dict=False)[0]
    with pytest.raises(RuntimeError, match="stop"), DualPath(model, SMALL):
        raise RuntimeError("stop")
    assert torch.equal(model(**call, return_dict=False)[0], stock)


def test_models_without_separate_cross_attention_are_refused(tiny_pipelines):
    transformer = tiny_pipelines.flux().pipe.transformer
    with (
        pytest.raises(InputError, match="separate text cross-attention"),
        DualPath(transformer, SMALL),
    ):
        pass


@pytest.mark.parametrize(("shift", "start"), [(9.0, 0.954), (3.0, 0.875), (5.0, 0.921)])
def test_denoising_starts_where_the_paper_starts(tiny_pipelines, shift, start):
    scheduler = shifted_scheduler(tiny_pipelines.wan21().pipe, shift)
    scheduler.set_timesteps(50)
    sigmas = scheduler.sigmas[50 - FreeSwim().executed_steps :]
    assert len(sigmas) == 36
    assert float(sigmas[0]) == pytest.approx(start, abs=2e-3)
    if shift == 9.0:
        published = torch.tensor([0.954, 0.931, 0.900, 0.857, 0.794, 0.692, 0.500])
        torch.testing.assert_close(sigmas[:-1:5], published, atol=3e-3, rtol=0)


def test_whole_windows_at_every_step_equal_the_stock_pipeline(tiny_pipelines):
    tiny = tiny_pipelines.wan21()
    text, negative = (tiny.arguments[f"{name}prompt_embeds"] for name in ("", "negative_"))
    recipe = FreeSwim(steps=6, strength=0.67, guide_every=1, method=WHOLE)
    clean = random(1, 16, 3, 8, 12)
    found, _ = refine_latents(
        tiny.pipe, clean, Conditions(text, negative), recipe,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    scheduler = shifted_scheduler(tiny.pipe, 9.0)
    stock = diffusers.WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=tiny.pipe.transformer,
        scheduler=scheduler,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(6)
    sigma = scheduler.sigmas[2]
    noised = (1 - sigma) * clean + sigma * random(*clean.shape, seed=3)
    expected = stock(
        video=None, latents=noised, prompt_embeds=text, negative_prompt_embeds=negative,
        height=64, width=96, num_inference_steps=6, strength=0.67, guidance_scale=5.0,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guide_every", [1, 2, 3, None])
def test_full_paths_run_when_the_period_says(tiny_pipelines, guide_every):
    tiny = tiny_pipelines.wan21()
    rows = []
    block = tiny.pipe.transformer.blocks[0]
    hook = block.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    text, negative = (tiny.arguments[f"{name}prompt_embeds"] for name in ("", "negative_"))
    recipe = FreeSwim(steps=5, strength=1.0, guide_every=guide_every, method=SMALL)
    refine_latents(tiny.pipe, random(1, 16, 3, 8, 12), Conditions(text, negative), recipe)
    hook.remove()
    expected = [2 if guide_every and step % guide_every == 0 else 1 for step in range(5)]
    assert rows[::2] == expected and rows[1::2] == [1] * 5


@pytest.mark.parametrize("name", ["wan2.2", "wan2.2-ti2v"])
def test_two_transformers_and_timesteps_per_token(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    channels = tiny.pipe.transformer.config.in_channels
    text, negative = (tiny.arguments[f"{n}prompt_embeds"] for n in ("", "negative_"))
    both = Conditions(text.repeat(2, 1, 1), negative.repeat(2, 1, 1))
    recipe = FreeSwim(steps=4, strength=1.0, guide_every=3, guide_negative=True, method=SMALL)
    found, reports = refine_latents(tiny.pipe, random(2, channels, 3, 8, 12), both, recipe)
    assert torch.isfinite(found).all() and len(found) == 2
    assert set(reports) == set(tiny.layers)
    assert all(report.density < 1 for report in reports.values())


def test_a_whole_video(video_pipe):
    pipe, embeds = video_pipe()
    recipe = FreeSwim(steps=3, strength=0.67, method=SMALL)
    job = VideoJob(None, (96, 64), 9, native=(48, 32), steps=2, recipe=recipe, **embeds)
    result = generate_video(pipe, job)
    assert result.frames.shape == (1, 9, 3, 64, 96)
    assert 0 <= result.frames.min() and result.frames.max() <= 1
    assert list(result.seconds) == [
        "sample 48x32",
        "encode 96x64",
        "denoise 96x64",
        "decode 96x64",
    ]
    assert not pipe.vae.use_tiling
    again = generate_video(pipe, job)
    assert torch.equal(again.frames, result.frames)
    other = generate_video(pipe, replace(job, seed=1))
    assert not torch.equal(other.frames, result.frames)


def test_positions_along_time_change_both_stages_and_come_back(video_pipe):
    pipe, embeds = video_pipe()
    before = pipe.transformer.rope.freqs_cos
    recipe = FreeSwim(steps=2, strength=1.0, method=SMALL)
    job = VideoJob(None, (48, 32), 9, native=(48, 32), steps=2, recipe=recipe, **embeds)
    same, slower = (
        generate_video(pipe, replace(job, positions=positions)).frames
        for positions in (Linear(1.0), Linear(2.0))
    )
    plain = generate_video(pipe, job).frames
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert (slower - plain).abs().max() > 1e-3
    clip = torch.rand(1, 9, 3, 32, 48)
    job = replace(job, size=(96, 64), video=clip)
    large = [
        generate_video(pipe, replace(job, positions=positions)).frames
        for positions in (None, Linear(2.0))
    ]
    assert (large[0] - large[1]).abs().max() > 1e-3
    assert pipe.transformer.rope.freqs_cos is before


def test_the_embedded_preset_is_found_by_a_relative_path(monkeypatch):
    monkeypatch.chdir(EMBEDDED_VIDEO.parents[1])
    assert video_preset(EMBEDDED_VIDEO) is EMBEDDED_VIDEO_PRESET
    assert video_preset("embedded/video") is EMBEDDED_VIDEO_PRESET
    assert video_preset("owner/name") is WAN


def test_presets_change_positions_of_long_videos_alone(video_pipe):
    pipe, _ = video_pipe()
    assert WAN.positions_for(pipe, 81) is None
    assert WAN.positions_for(pipe, 161) == Riflex(41)
    assert EMBEDDED_VIDEO_PRESET.positions_for(pipe, 17) is None
    assert EMBEDDED_VIDEO_PRESET.positions_for(pipe, 33) == Linear(9 / 5)


def test_a_given_video_and_a_given_first_frame(video_pipe):
    recipe = FreeSwim(steps=2, strength=1.0, method=SMALL)
    pipe, embeds = video_pipe()
    clip = torch.rand(1, 5, 3, 32, 48)
    job = VideoJob(None, (96, 64), 5, recipe=recipe, **embeds)
    result = generate_video(pipe, replace(job, video=clip))
    assert result.frames.shape == (1, 5, 3, 64, 96) and "sample" not in str(result.seconds)
    pipe, embeds = video_pipe(diffusers.WanImageToVideoPipeline, in_channels=36, out_channels=16)
    frame = Image.new("RGB", (96, 64), "red")
    job = replace(job, image=frame, native=(48, 32), steps=1, **embeds)
    result = generate_video(pipe, job)
    assert result.frames.shape == (1, 5, 3, 64, 96) and torch.isfinite(result.frames).all()


def test_native_size_keeps_area_and_aspect(video_pipe):
    pipe, _ = video_pipe()
    assert native_size(pipe, 832, 480) == (832, 480)
    assert native_size(pipe, 1920, 1088) == (832, 480)
    assert native_size(pipe, 1088, 1920) == (480, 832)
    assert native_size(pipe, 320, 320) == (320, 320)


@pytest.mark.parametrize(
    ("size", "frames", "message"),
    [((90, 64), 9, "multiples of 16"), ((96, 64), 8, "multiple of 4"), ((0, 64), 9, "positive")],
)
def test_bad_sizes_are_refused(video_pipe, size, frames, message):
    pipe, embeds = video_pipe()
    with pytest.raises(InputError, match=message):
        generate_video(pipe, VideoJob(None, size, frames, **embeds))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"strength": 0.0}, "strength must lie"),
        ({"shift": -1.0}, "shift must be"),
        ({"guidance_scale": 0.5}, "guidance_scale must be"),
        ({"guide_every": 0}, "guide_every must be"),
    ],
)
def test_bad_recipes_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        FreeSwim(**knobs)
