"""Plans from configuration files alone, against what really runs."""

import json
from dataclasses import replace

import pytest
import torch

from diffaccel import (
    FullAttn,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
    SparseAttn,
    set_attn_processor,
)
from diffaccel.bindings import binding_of
from diffaccel.errors import InputError, ModelError
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.image.generate import generate_image
from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.presets import EMBEDDED, Preset
from diffaccel.pipelines.image.recipe import Recipe, Refinement
from diffaccel.pipelines.plan.image import plan_image, shares_of
from diffaccel.pipelines.plan.operations import autoencoder_flop, other_flop, served_layers
from diffaccel.pipelines.plan.skeleton import read_outline
from diffaccel.pipelines.plan.video import plan_video
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.job import VideoJob
from diffaccel.pipelines.video.long_video import TimeWindows

FAST = Refinement(steps=2, strength=0.5, max_upscale=8.0)


def folder_of(pipe, folder):
    """Writes what `save_pretrained` does, without any weight."""
    index = {"_class_name": type(pipe).__name__}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            (folder / name).mkdir()
            text = json.dumps(dict(part.config), default=str)
            (folder / name / "config.json").write_text(text)
            index[name] = ["diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def counted(model, call):
    """Operations of matrix products and convolutions in one real call."""
    total = 0.0

    def count(module, _inputs, output):
        nonlocal total
        weight = module.weight
        outputs = output.numel() // len(output)
        total += 2.0 * weight.numel() * outputs / weight.shape[0]

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    call()
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", ["flux", "sd3", "sd15", "sdxl", "wan2.1"])
@pytest.mark.slow
def test_layouts_and_work_are_those_of_a_real_call(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    ((kind, _),) = tiny.layers.items()
    model = getattr(tiny.pipe, kind)
    height, width = tiny.arguments["height"], tiny.arguments["width"]
    scale = 8 if name == "wan2.1" else tiny.pipe.vae_scale_factor
    latents = (height // scale, width // scale)
    latents = (3, *latents) if name == "wan2.1" else latents
    prompt = tiny.arguments["prompt_embeds"].shape[1]
    layers = served_layers(model, latents, prompt)
    assert {served.layout for served in layers} == tiny.layouts
    assert len(layers) == tiny.layers[kind]
    planned = other_flop(model, latents, prompt)
    if binding_of(model).text_layers(model):  # one beside each layer of self-attention
        planned -= sum(4.0 * x.layout.length * prompt * x.heads * x.dim for x in layers)
    found = counted(model, lambda: tiny.sample(num_inference_steps=1))
    calls = 2 if name == "wan2.1" else 1
    rows = calls if "negative_prompt_embeds" in tiny.arguments and calls == 2 else 1
    assert planned == pytest.approx(found / rows, rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        FullAttn(),
        NeighborhoodAttn(4),
        SlidingWindowAttn(5),
        SparseAttn(0.5, p_remain=0.0, block=16),
        RectifiedSpaAttn(0.6, p_remain=0.0, block=16, dense_layers=1, dense_steps=1),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("name", ["flux", "sdxl"])
@pytest.mark.slow
def test_planned_density_is_that_of_the_report(tiny_pipelines, tmp_path, name, method):
    tiny = tiny_pipelines.BUILDERS[name]()
    outline = read_outline(folder_of(tiny.pipe, tmp_path))
    ((kind, model),) = outline.denoisers.items()
    assert all(parameter.is_meta for parameter in model.parameters())
    height, width = tiny.arguments["height"], tiny.arguments["width"]
    latents = tuple(side // outline.vae_scale_factor_spatial for side in (height, width))
    layers = served_layers(model, latents, 12 if name == "flux" else 0)
    shares, _ = shares_of(method, layers, model, outline, range(2), "cpu")
    with set_attn_processor(tiny.pipe, method) as attachment:
        tiny.sample()
        report = attachment.report()
    # the report weighs levels by pairs alone, the plan by their heads and widths too
    pairs = sum(layer.pairs for layer in report.layers)
    mean = sum(layer.density * layer.pairs for layer in report.layers) / pairs
    assert shares.exact == pytest.approx(mean, abs=0.02 if name == "flux" else 0.1)
    works = [layer.visited for layer in report.layers if layer.visited]
    if works and name == "flux":
        assert (shares.visited, shares.ideal) == pytest.approx(
            (works[0].visited, works[0].ideal), abs=1e-6
        )
    assert shares.ideal <= shares.visited <= 1.0


@pytest.mark.slow
def test_stages_and_tokens_are_those_of_the_generation(tiny_pipelines, tmp_path):
    tiny = tiny_pipelines.flux()
    tiny.pipe.vae.register_to_config(shift_factor=0.0)
    told = {name: value for name, value in tiny.arguments.items() if "embeds" in name}
    preset = Preset(64, 2, {"cascade": Recipe(FAST, "full")}, arguments=told, text=12)
    method = NeighborhoodAttn(4)
    job = ImageJob(None, (128, 192), preset, method)
    result = generate_image(tiny.pipe, job)
    outline = read_outline(folder_of(tiny.pipe, tmp_path))
    plan = plan_image(outline, job)
    assert tuple(phase.size for phase in plan.phases) == result.stages
    last = plan.phases[-1]
    (layout,) = {layer.layout for layer in result.reports["128x192"].layers}
    assert (last.grid, last.text) == (layout.grid, 12)
    assert last.shares.exact == pytest.approx(result.reports["128x192"].density)
    assert last.steps == result.reports["128x192"].denoisers[0].steps
    assert plan.parameters == sum(
        p.numel() for m in (tiny.pipe.transformer, tiny.pipe.vae) for p in m.parameters()
    )


@pytest.mark.slow
def test_the_embedded_model_at_4096():
    outline = read_outline(EMBEDDED_IMAGE)
    plan = plan_image(outline, ImageJob(None, (4096, 4096), EMBEDDED, NeighborhoodAttn(16)))
    assert [phase.size[0] for phase in plan.phases] == [256, 512, 1024, 2048, 4096]
    first, last = plan.phases[0], plan.phases[-1]
    assert (first.rows, last.rows) == (40, 4)  # the native sample runs both prompts
    assert last.visual == 65_536 and last.text == 32
    assert last.shares.exact == pytest.approx((16 / 256) ** 2, rel=0.3)
    assert last.attention_time < 0.05 and last.attention_time < last.time < 0.2
    assert 1.5e9 < last.memory < 3e9  # measured: 2.2 GB
    direct = EMBEDDED.recipes["direct"].refinement
    job = ImageJob(None, (4096, 4096), EMBEDDED, FullAttn(), direct)
    (only,) = plan_image(outline, job).phases
    assert only.time == only.attention_time == 1.0
    assert only.attention_flop == 5 * 4 * (65_536 + 32) ** 2 * 256
    decoded = autoencoder_flop(outline.modules["vae"], {(512, 512): 1}, "decode") / 512**2 / 2
    assert decoded == pytest.approx(80e3, rel=0.1)  # multiply-adds per pixel, as on its card


def test_a_size_that_the_denoiser_refuses_is_refused(tiny_pipelines):
    model = tiny_pipelines.sd3().pipe.transformer  # its table of positions has 32 x 32 patches
    with pytest.raises(InputError, match="must take latents of 80x80 elements"):
        other_flop(model, (80, 80), 10)


@pytest.mark.slow
def test_videos(video_pipe, tmp_path):
    pipe, embeds = video_pipe()
    outline = read_outline(folder_of(pipe, tmp_path), is_video=True)
    recipe = FreeSwim(steps=6, strength=0.67, method=SlidingWindowAttn(3))
    job = VideoJob(None, (96, 64), 9, recipe=recipe, steps=2, native=(48, 32), **embeds)
    plan = plan_video(outline, job)
    sample, refined = plan.phases
    assert sample.rows == 4 and sample.size == (48, 32)
    assert refined.steps == 4 and refined.rows == 8 + 2  # every second step has a guide
    result = generate_video(pipe, job)
    (layout,) = {layer.layout for layer in result.reports["transformer"].layers}
    assert refined.grid == layout.grid == (3, 4, 6)
    alone = FreeSwim(steps=6, guide_every=None, method=recipe.method)
    window = plan_video(outline, replace(job, recipe=alone)).phases[-1]
    assert window.shares.exact == pytest.approx(9 / 24)
    assert refined.shares.exact == pytest.approx((8 * 9 / 24 + 2) / 10)
    assert window.memory < refined.memory
    assert len(plan_video(outline, replace(job, native=None)).phases) == 1  # at native size


def test_long_videos_attend_windows(video_pipe, tmp_path):
    pipe, _ = video_pipe()
    outline = read_outline(folder_of(pipe, tmp_path), is_video=True)
    windows = TimeWindows(3, 0, moves=False)
    (phase,) = plan_video(outline, VideoJob(None, (96, 64), 33, recipe=windows, steps=2)).phases
    assert phase.grid[0] == 9 and phase.shares.exact == pytest.approx(1 / 3)
    assert phase.other_share == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing-here", "not in the hub's cache"),
        ("./missing", "diffusers folder or a hub name"),
    ],
)
def test_sources_that_cannot_be_read(source, message):
    with pytest.raises(ModelError, match=message):
        read_outline(source)


def test_folders_that_lack_a_configuration(tiny_pipelines, tmp_path):
    folder = folder_of(tiny_pipelines.flux().pipe, tmp_path)
    with pytest.raises(ModelError, match="must be one of the 15 video pipelines"):
        read_outline(folder, is_video=True)
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json of the denoiser"):
        read_outline(folder)
