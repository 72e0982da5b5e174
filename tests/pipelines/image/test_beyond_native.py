"""Recipes and switches on tiny pipelines of every image family."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffaccel import (
    FullAttn,
    JitteredAttn,
    NeighborhoodAttn,
    ProportionalAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
)
from diffaccel.bindings import UnsupportedModelError
from diffaccel.bindings.rope import Ntk, Yarn
from diffaccel.errors import InputError
from diffaccel.pipelines.image.beyond_native import (
    axis_of,
    beyond_native,
    scheduler_for,
)
from diffaccel.pipelines.image.generate import generate_image
from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.presets import BY_PIPELINE, EMBEDDED, Preset
from diffaccel.pipelines.image.recipe import AT_ONCE, IMAGE_RECIPES, Recipe, Refinement

FAST = Refinement(steps=2, strength=0.5, max_upscale=AT_ONCE)


def preset_of(tiny, native=64):
    told = {name: value for name, value in tiny.arguments.items() if "embeds" in name}
    text = 12 if tiny.family == "flux" else 0
    recipes = {"fast": Recipe(FAST, "full")}
    return Preset(native, 2, recipes, arguments=told, recipe="fast", text=text)


def made(tiny, side, refinement, method, seed=0):
    tiny.pipe.vae.register_to_config(shift_factor=0.0)
    with np.errstate(all="ignore"):
        job = ImageJob(None, (side, side), preset_of(tiny), method, refinement, seed=seed)
        return generate_image(tiny.pipe, job)


@pytest.mark.parametrize("name", ["flux", "sd3", "sd15", "sdxl"])
@pytest.mark.slow
def test_guided_stages_run_on_every_family_and_leave_it_alone(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    scheduler = tiny.pipe.scheduler
    free = made(tiny, 128, FAST, SlidingWindowAttn(3))
    guided = made(tiny, 128, replace(FAST, guidance=1.0), SlidingWindowAttn(3))
    assert free.stages == guided.stages == ((64, 64), (128, 128))
    assert guided.reports["128x128"].density < 1.0
    assert not np.array_equal(np.asarray(free.image), np.asarray(guided.image))
    assert tiny.pipe.scheduler is scheduler


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_direct_sampling_is_the_stock_pipeline_with_a_method(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    scheduler = tiny.pipe.scheduler
    result = made(tiny, 128, replace(FAST, direct=True), FullAttn())
    assert result.stages == ((128, 128),) and list(result.reports) == ["128x128"]
    stock = preset_of(tiny, native=128)
    expected = generate_image(tiny.pipe, ImageJob(None, (128, 128), stock, FullAttn(), FAST))
    assert np.array_equal(np.asarray(result.image), np.asarray(expected.image))
    assert tiny.pipe.scheduler is scheduler


@pytest.mark.slow
def test_each_switch_changes_the_picture_of_flux(tiny_pipelines):
    tiny, windows = tiny_pipelines.flux(), NeighborhoodAttn(4, 3)
    changes = (
        {}, {"shift": 6.0}, {"shift": "size"}, {"rope": "ntk"}, {"rope": "yarn"},
        {"proportional": True}, {"guidance": 1.0}, {"max_upscale": 1.5},
    )  # fmt: skip
    pictures = [
        np.asarray(made(tiny, 128, replace(FAST, **change), windows).image).tobytes()
        for change in changes
    ]
    assert len(set(pictures)) == len(changes)


def test_jitter_reaches_the_layers_and_ends_with_the_context(tiny_pipelines):
    """In latents: pictures of 8 bits do not show what a border does to random weights."""
    tiny, windows = tiny_pipelines.flux(), NeighborhoodAttn(4, 3)
    stock, found = tiny.sample(), []
    for jitter, seed in ((False, 0), (True, 0), (True, 0), (True, 1)):
        switches = replace(FAST, jitter=jitter)
        job = ImageJob(None, (96, 64), preset_of(tiny), windows, switches, seed=seed)
        with beyond_native(tiny.pipe, job):
            found.append(tiny.sample())
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[3])
    assert torch.equal(tiny.sample(), stock)


def test_the_shift_grows_with_the_size(tiny_pipelines):
    tiny, unet = tiny_pipelines.flux(), tiny_pipelines.sdxl()

    def scheduler(tiny, size, **changes):
        refinement = replace(FAST, **changes)
        return scheduler_for(
            tiny.pipe, ImageJob(None, size, preset_of(tiny), FullAttn(), refinement)
        )

    own = tiny.pipe.scheduler.config.shift
    by_size = scheduler(tiny, (256, 128), shift="size")
    assert by_size.config.shift == pytest.approx(own * sqrt(8))
    assert scheduler(tiny, (32, 32), shift="size").config.shift == own
    assert scheduler(tiny, (256, 128), shift=7.5).config.shift == 7.5
    assert scheduler(tiny, (256, 128)).config.shift == own
    assert type(scheduler(unet, (256, 128))) is EulerDiscreteScheduler
    with pytest.raises(InputError, match="flow models, got EulerDiscreteScheduler"):
        scheduler(unet, (256, 128), shift=3.0)


def test_methods_are_wrapped_as_the_switches_say():
    both = replace(FAST, jitter=True, proportional=True)
    inner = NeighborhoodAttn(16, 8)
    job = ImageJob(None, (512, 512), EMBEDDED, inner, both, seed=5)
    assert job.attention == ProportionalAttn(JitteredAttn(inner, 5), 16 * 16 + 32)
    unet = replace(job, preset=BY_PIPELINE["StableDiffusionXLPipeline"])
    assert unet.attention.train_tokens is None
    assert replace(job, refinement=FAST).attention is inner
    with pytest.raises(InputError, match="got RectifiedSpaAttn"):
        replace(job, method=RectifiedSpaAttn())


def test_a_stage_is_a_job_of_its_own_size_and_seed():
    job = ImageJob("a cat", (1024, 512), EMBEDDED, FullAttn(), seed=7)
    assert [stage.size for stage in job.stages][0] == (368, 176)
    assert job.stages[-1] == replace(job, seed=7 + len(job.stages) - 1)
    assert job.native_steps == EMBEDDED.steps and replace(job, steps=3).native_steps == 3
    with pytest.raises(InputError, match="steps must be at least 1"):
        replace(job, steps=0)


def test_positions_are_scaled_by_the_factor_of_each_side():
    preset = Preset(256, 2, {})
    ntk, yarn = (
        ImageJob("", (1024, 128), preset, refinement=replace(FAST, rope=rope))
        for rope in ("ntk", "yarn")
    )
    assert axis_of(ntk, 1024) == Ntk(4.0)
    assert axis_of(yarn, 128) == Yarn(1.0, 16)


def test_switches_that_do_not_suit_the_model_are_refused_before_any_work(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    with pytest.raises(UnsupportedModelError, match="FluxTransformer2DModel"):
        made(tiny, 128, replace(FAST, rope="ntk"), FullAttn())
    with pytest.raises(InputError, match="jitter moves the borders"):
        made(tiny, 128, replace(FAST, jitter=True), FullAttn())


@pytest.mark.parametrize("preset", [EMBEDDED, *BY_PIPELINE.values()])
def test_every_family_has_every_recipe(preset):
    assert tuple(preset.recipes) == tuple(IMAGE_RECIPES)
    assert preset.recipe in IMAGE_RECIPES and preset.refinement.max_upscale == 2.0
    assert [r.refinement.direct for r in preset.recipes.values()] == [True, False, False, False]
    assert [r.refinement.guidance > 0 for r in preset.recipes.values()][1:] == [False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"strength": 0.0}, "strength lie in"),
        ({"max_upscale": 1.0}, "max_upscale must exceed 1"),
        ({"rope": "linear"}, "rope must be one of plain, ntk, yarn"),
        ({"shift": 0.0}, "shift must be positive"),
        ({"shift": "large"}, "shift must be positive"),
    ],
)
def test_bad_switches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FAST, **change)
