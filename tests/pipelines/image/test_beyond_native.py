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
    method_with,
    scheduler_for,
)
from diffaccel.pipelines.image.generate import generate_image
from diffaccel.pipelines.image.presets import BY_PIPELINE, EMBEDDED, Preset
from diffaccel.pipelines.image.recipe import AT_ONCE, Recipe, Refinement
from diffaccel.pipelines.recipes import IMAGE_RECIPES

FAST = Refinement(steps=2, strength=0.5, max_upscale=AT_ONCE)


def preset_of(tiny, native=64):
    told = {name: value for name, value in tiny.arguments.items() if "embeds" in name}
    text = 12 if tiny.family == "flux" else 0
    recipes = {"fast": Recipe(FAST, "full")}
    return Preset(native, 2, recipes, arguments=told, recipe="fast", text=text)


def made(tiny, side, refinement, method, seed=0):
    tiny.pipe.vae.register_to_config(shift_factor=0.0)
    with np.errstate(all="ignore"):
        return generate_image(
            tiny.pipe, None, side, side, preset=preset_of(tiny), method=method,
            refinement=refinement, seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["flux", "sd3", "sd15", "sdxl"])
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
    expected = generate_image(
        tiny.pipe, None, 128, 128, preset=stock, method=FullAttn(), refinement=FAST
    )
    assert np.array_equal(np.asarray(result.image), np.asarray(expected.image))
    assert tiny.pipe.scheduler is scheduler


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
        with beyond_native(tiny.pipe, (96, 64), preset_of(tiny), windows, switches, seed):
            found.append(tiny.sample())
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[3])
    assert torch.equal(tiny.sample(), stock)


def test_the_shift_grows_with_the_size(tiny_pipelines):
    pipe = tiny_pipelines.flux().pipe
    own = pipe.scheduler.config.shift
    by_size = scheduler_for(pipe, (256, 128), 64, replace(FAST, shift="size"))
    assert by_size.config.shift == pytest.approx(own * sqrt(8))
    assert scheduler_for(pipe, (32, 32), 64, replace(FAST, shift="size")).config.shift == own
    assert scheduler_for(pipe, (256, 128), 64, replace(FAST, shift=7.5)).config.shift == 7.5
    assert scheduler_for(pipe, (256, 128), 64, FAST).config.shift == own
    unet = tiny_pipelines.sdxl().pipe
    assert type(scheduler_for(unet, (256, 128), 64, FAST)) is EulerDiscreteScheduler
    with pytest.raises(InputError, match="flow models, got EulerDiscreteScheduler"):
        scheduler_for(unet, (256, 128), 64, replace(FAST, shift=3.0))


def test_methods_are_wrapped_as_the_switches_say():
    both = replace(FAST, jitter=True, proportional=True)
    inner = NeighborhoodAttn(16, 8)
    wrapped = method_with(inner, EMBEDDED, both, seed=5)
    assert wrapped == ProportionalAttn(JitteredAttn(inner, 5), 16 * 16 + 32)
    assert method_with(inner, BY_PIPELINE["StableDiffusionXLPipeline"], both).train_tokens is None
    assert method_with(inner, EMBEDDED, FAST) is inner
    with pytest.raises(InputError, match="got RectifiedSpaAttn"):
        method_with(RectifiedSpaAttn(), EMBEDDED, both)


def test_positions_are_scaled_by_the_factor_of_each_side():
    assert axis_of(replace(FAST, rope="ntk"), 1024, 256) == Ntk(4.0)
    assert axis_of(replace(FAST, rope="yarn"), 128, 256) == Yarn(1.0, 16)


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
