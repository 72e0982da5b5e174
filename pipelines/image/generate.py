"""Generates images of any size: native sample, then upscale, re-noise and denoise by stages.

The stages follow SDEdit (Meng et al., 2021, https://arxiv.org/abs/2108.01073): the native sample
fixes the composition, each stage redraws detail at its own scale. The attention method works
above native size, where attention is what costs.
"""

from dataclasses import dataclass, field
from math import ceil, log, sqrt

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.attach.report import Report
from diffaccel.errors import InputError
from diffaccel.methods.base import Method
from diffaccel.pipelines.image.beyond_native import (
    MULTIPLE,
    beyond_native,
    method_with,
    scaled_positions,
    scheduler_for,
)
from diffaccel.pipelines.image.presets import Preset
from diffaccel.pipelines.image.recipe import Refinement
from diffaccel.pipelines.image.tiling import tile_count, tiled
from diffaccel.progress import Timing, step_callback


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image and how it came about.

    Attributes:
        image: The picture, RGB.
        stages: Sizes in pixels (width, height), the native one first; one alone where it was
            sampled at once.
        seconds: Phase name to wall-clock seconds.
        reports: Per stage above native size, what the attention method did.
    """

    image: Image.Image
    stages: tuple[tuple[int, int], ...]
    seconds: dict[str, float]
    reports: dict[str, Report] = field(default_factory=dict)


def check_size(width: int, height: int) -> None:
    """Raises InputError unless both sides are positive multiples of 16 pixels."""
    if min(width, height) < 1 or width % MULTIPLE or height % MULTIPLE:
        near = tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (width, height))
        raise InputError(
            f"width and height must be positive multiples of {MULTIPLE}, got {width}x{height}; "
            f"use {near[0]}x{near[1]}"
        )


def plan_stages(
    width: int, height: int, native: int, max_upscale: float
) -> tuple[tuple[int, int], ...]:
    """Lists the sizes that a picture passes through, from native to the one asked for.

    Args:
        width: Final width in pixels.
        height: Final height in pixels.
        native: Side of the model's square training size; the first stage has its area.
        max_upscale: Largest factor between stages.

    Returns:
        Sizes (width, height), all multiples of 16, the last one the final size. A picture of at
        most native area has one stage.
    """
    total = sqrt(width * height) / native
    if total <= 1.0:
        return ((width, height),)
    jumps = max(1, ceil(round(log(total) / log(max_upscale), 6)))
    sizes = [
        tuple(
            max(MULTIPLE, round(side / total ** ((jumps - i) / jumps) / MULTIPLE) * MULTIPLE)
            for side in (width, height)
        )
        for i in range(jumps)
    ]
    return (*sizes, (width, height))


def generate_image(
    pipe: DiffusionPipeline,
    prompt: str,
    width: int,
    height: int,
    *,
    preset: Preset,
    method: Method,
    steps: int | None = None,
    refinement: Refinement | None = None,
    seed: int = 0,
    timing: Timing | None = None,
) -> GeneratedImage:
    """Generates one image.

    Args:
        pipe: A stock text-to-image pipeline with an image-to-image twin.
        prompt: What to draw.
        width: In pixels, a multiple of 16.
        height: In pixels, a multiple of 16.
        preset: How the pipeline is called.
        method: Attention above native size; the native sample runs the stock attention.
        steps: Denoising steps at native size, the preset's by default.
        refinement: Stages above native size, the preset's by default.
        seed: Of all noise; equal seeds give equal bits on one machine.
        timing: Where phases are timed and drawn.

    Returns:
        The image, the time of each phase, and the method's report of each stage.

    Raises:
        InputError: The size breaks the rule of `check_size`.
        UnsupportedModelError: The denoiser's attention is not known.
    """
    check_size(width, height)
    timing = timing or Timing()
    refinement = refinement or preset.refinement
    stages = plan_stages(width, height, preset.native, refinement.max_upscale)
    steps = steps or preset.steps
    _check_switches(pipe, (width, height), preset, method, refinement)
    if refinement.direct and len(stages) > 1:
        image, report = _sample_at_once(
            pipe, prompt, (width, height), preset, method, refinement, steps, seed, timing
        )
        reports = {f"{width}x{height}": report}
        return GeneratedImage(image, ((width, height),), timing.seconds, reports)
    reports = {}
    image = _sample(pipe, prompt, stages[0], preset, steps, seed, timing)
    for index, size in enumerate(stages[1:], start=1):
        image, report = refine_image(
            pipe,
            prompt,
            image,
            *size,
            preset=preset,
            method=method,
            refinement=refinement,
            seed=seed + index,
            timing=timing,
        )
        reports[f"{size[0]}x{size[1]}"] = report
    return GeneratedImage(image, stages, timing.seconds, reports)


def refine_image(
    pipe: DiffusionPipeline,
    prompt: str,
    image: Image.Image,
    width: int,
    height: int,
    *,
    preset: Preset,
    method: Method,
    refinement: Refinement | None = None,
    seed: int = 0,
    timing: Timing | None = None,
) -> tuple[Image.Image, Report]:
    """Carries an image to a larger size: upscale, encode, noise, denoise, decode.

    Args:
        pipe: A stock text-to-image pipeline with an image-to-image twin.
        prompt: What the image shows.
        image: RGB, of the same aspect.
        width: In pixels, a multiple of 16.
        height: In pixels, a multiple of 16.
        preset: How the pipeline is called.
        method: The attention.
        refinement: Steps and strength, the preset's by default.
        seed: Of the noise.
        timing: Where phases are timed and drawn.

    Returns:
        The larger image, and what the attention method did.

    Raises:
        InputError: The size breaks the rule of `check_size`.
        UnsupportedModelError: The denoiser's attention is not known.
    """
    check_size(width, height)
    refinement = refinement or preset.refinement
    refiner = AutoPipelineForImage2Image.from_pipe(pipe)
    refiner.set_progress_bar_config(disable=True)
    refiner.scheduler = scheduler_for(pipe, (width, height), preset.native, refinement)
    with beyond_native(pipe, (width, height), preset, method, refinement, seed) as attachment:
        refined = _refine(
            refiner, prompt, image, (width, height), preset, refinement, seed, timing or Timing()
        )
        return refined, attachment.report()


def _check_switches(
    pipe: DiffusionPipeline,
    size: tuple[int, int],
    preset: Preset,
    method: Method,
    refinement: Refinement,
) -> None:
    """Refuses an unknown model, and switches that do not suit it, before any work."""
    with set_attn_processor(pipe, method_with(method, preset, refinement)):
        scaled_positions(pipe, size, preset.native, refinement)
        scheduler_for(pipe, size, preset.native, refinement)


def _sample_at_once(
    pipe: DiffusionPipeline,
    prompt: str,
    size: tuple[int, int],
    preset: Preset,
    method: Method,
    refinement: Refinement,
    steps: int,
    seed: int,
    timing: Timing,
) -> tuple[Image.Image, Report]:
    """Samples at full size from noise, with the method and the switches at work."""
    own = pipe.scheduler
    try:
        pipe.scheduler = scheduler_for(pipe, size, preset.native, refinement)
        with beyond_native(pipe, size, preset, method, refinement, seed) as attachment:
            with tiled(pipe.vae, lambda _kind: None):
                image = _sample(pipe, prompt, size, preset, steps, seed, timing)
            return image, attachment.report()
    finally:
        pipe.scheduler = own


def _sample(
    pipe: DiffusionPipeline,
    prompt: str,
    size: tuple[int, int],
    preset: Preset,
    steps: int,
    seed: int,
    timing: Timing,
) -> Image.Image:
    """Calls the text-to-image pipeline."""
    name = f"sample {size[0]}x{size[1]}"
    with timing.phases({name: steps}) as advance:
        return pipe(
            prompt,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=step_callback(lambda: advance(name)),
            **preset.arguments,
        ).images[0]


def _refine(
    refiner: DiffusionPipeline,
    prompt: str,
    image: Image.Image,
    size: tuple[int, int],
    preset: Preset,
    refinement: Refinement,
    seed: int,
    timing: Timing,
) -> Image.Image:
    """Runs the phases of `refine_image` with the method attached."""
    label = f"{size[0]}x{size[1]}"
    schedule = max(1, round(refinement.steps / refinement.strength))
    steps = schedule - int(max(schedule - schedule * refinement.strength, 0))
    tiles = tile_count(*size)
    phases = {f"encode {label}": tiles, f"denoise {label}": steps, f"decode {label}": tiles}
    with timing.phases(phases) as advance:
        with tiled(refiner.vae, lambda kind: advance(f"{kind} {label}")):
            return refiner(
                prompt,
                image=image.resize(size, Image.Resampling.LANCZOS),
                width=size[0],
                height=size[1],
                strength=refinement.strength,
                num_inference_steps=schedule,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=step_callback(lambda: advance(f"denoise {label}")),
                **{**preset.arguments, **preset.refine_arguments},
            ).images[0]
