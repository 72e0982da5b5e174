"""Generates images of any size: native sample, then upscale, re-noise and denoise by stages.

The stages follow SDEdit (Meng et al., 2021, https://arxiv.org/abs/2108.01073): the native sample
fixes the composition, each stage redraws detail at its own scale. The attention method works
above native size, where attention is what costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import unwrap
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffaccel.attach.attachment import denoisers, set_attn_processor
from diffaccel.attach.caches import CACHE_DIT, READS_CONTEXT, caches_of, refuse_caches
from diffaccel.attach.report import Report
from diffaccel.errors import InputError
from diffaccel.pipelines.image.beyond_native import beyond_native, scaled_positions, scheduler_for
from diffaccel.pipelines.image.job import ImageJob, Size
from diffaccel.pipelines.image.low_frequency import Arrangement, LowFrequencyGuidance
from diffaccel.pipelines.image.own_size import at_size, check_positions
from diffaccel.pipelines.image.presets import Preset, denoiser
from diffaccel.pipelines.image.prior import native_prior
from diffaccel.pipelines.image.tiling import tile_count, tiled
from diffaccel.pipelines.redraw.late_start import check_startable, started_from, starting_late
from diffaccel.pipelines.redraw.latents import LatentCodec
from diffaccel.pipelines.seed import seeded
from diffaccel.progress import Timing, counting_steps, step_callback


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
    stages: tuple[Size, ...]
    seconds: dict[str, float]
    reports: dict[str, Report] = field(default_factory=dict)


def generate_image(pipe: Any, job: ImageJob, *, timing: Timing | None = None) -> GeneratedImage:
    """Generates one image.

    Args:
        pipe: A stock text-to-image pipeline that has an image-to-image twin, or a codec in its
            preset.
        job: What to draw, and how.
        timing: Where phases are timed and drawn.

    Returns:
        The image, the time of each phase, and the method's report of each stage.

    Raises:
        InputError: A switch does not suit the model, or a cache of its denoiser cannot follow.
        UnsupportedModelError: The denoiser's attention is not known.
    """
    timing = timing or Timing()
    _check_model(pipe, job)
    if job.switches.direct and len(job.stages) > 1:
        with seeded(pipe, job.seed):
            image, report = _sample_at_once(pipe, job, timing)
        return GeneratedImage(image, (job.size,), timing.seconds, {job.label: report})
    first, *larger = job.stages
    reports = {}
    with native_prior(pipe), seeded(pipe, job.seed):
        image = _sample(pipe, first, timing)
        for stage in larger:
            image, reports[stage.label] = refine_image(pipe, stage, image, timing=timing)
    sizes = tuple(stage.size for stage in job.stages)
    return GeneratedImage(image, sizes, timing.seconds, reports)


def refine_image(
    pipe: Any, job: ImageJob, image: Image.Image, *, timing: Timing | None = None
) -> tuple[Image.Image, Report]:
    """Carries an image to a larger size in one stage: upscale, encode, noise, denoise, decode.

    Args:
        pipe: A stock text-to-image pipeline that has an image-to-image twin, or a codec in its
            preset.
        job: What the image shows, and how large it gets.
        image: RGB, of the same aspect.
        timing: Where phases are timed and drawn.

    Returns:
        The larger image, and what the attention method did.

    Raises:
        InputError: A switch does not suit the model, or a cache of its denoiser cannot follow.
        UnsupportedModelError: The denoiser's attention is not known.
    """
    timing = timing or Timing()
    check_positions(pipe, job)
    if job.preset.codec is not None:
        check_startable(pipe)
        with beyond_native(pipe, job) as attachment, seeded(pipe, job.seed):
            return _redraw(pipe, job, image, job.preset.codec, timing), attachment.report()
    refiner = AutoPipelineForImage2Image.from_pipe(pipe)
    _check_caches(pipe, refiner)
    refiner.set_progress_bar_config(disable=True)
    refiner.scheduler = scheduler_for(pipe, job)
    with beyond_native(refiner, job) as attachment, seeded(pipe, job.seed):
        return _refine(refiner, job, image, timing), attachment.report()


def _check_model(pipe: Any, job: ImageJob) -> None:
    """Refuses an unknown model, and switches and caches that do not suit, before any work."""
    if getattr(pipe, "vae", None) is None:
        raise InputError(
            f"to draw a picture a pipeline must have an autoencoder, this {type(pipe).__name__} "
            "has none; load it with its vae"
        )
    check_positions(pipe, job)
    if len(job.stages) > 1 and not job.switches.direct:
        if job.preset.codec is None:
            _check_caches(pipe, AutoPipelineForImage2Image.from_pipe(pipe))
        else:
            check_startable(pipe)
    with set_attn_processor(pipe, job.attention):
        scaled_positions(pipe, job)
        scheduler_for(pipe, job)


def _check_caches(pipe: Any, refiner: Any) -> None:
    """Refuses caches that live by what the text-to-image pipeline alone tells them."""
    refused = {CACHE_DIT}  # entered by the pipeline for which it was enabled
    if "cache_context" not in unwrap(type(refiner).__call__).__code__.co_names:
        refused |= READS_CONTEXT
    for model in denoisers(pipe).values():
        why = f"{type(refiner).__name__} makes the calls"
        refuse_caches(model, why, caches_of(model) & refused)


def _sample_at_once(pipe: Any, job: ImageJob, timing: Timing) -> tuple[Image.Image, Report]:
    """Samples at full size from noise, with the method and the switches at work."""
    own = pipe.scheduler
    try:
        pipe.scheduler = scheduler_for(pipe, job)
        with beyond_native(pipe, job) as attachment, tiled(pipe.vae, lambda _kind: None):
            return _sample(pipe, job, timing), attachment.report()
    finally:
        pipe.scheduler = own


def _sample(pipe: Any, job: ImageJob, timing: Timing) -> Image.Image:
    """Calls the text-to-image pipeline."""
    name = f"sample {job.label}"
    with timing.phases({name: job.native_steps}) as advance, at_size(pipe, job.size):
        output = pipe(
            prompt=job.prompt,
            width=job.size[0],
            height=job.size[1],
            num_inference_steps=job.native_steps,
            generator=torch.Generator().manual_seed(job.seed),
            **counting_steps(pipe, lambda: advance(name)),
            **job.preset.arguments,
        )
    return _picture(output)


def _picture(output: Any) -> Image.Image:
    """The first picture of a pipeline's output, under whatever name (Kandinsky 5: image), RGB."""
    return output[0][0].convert("RGB")


def _refine(refiner: Any, job: ImageJob, image: Image.Image, timing: Timing) -> Image.Image:
    """Runs the phases of `refine_image` with the method attached."""
    tiles, steps = tile_count(*job.size), job.switches.executed_steps
    phases = {"encode": tiles, "denoise": steps, "decode": tiles}
    with timing.phases({f"{kind} {job.label}": n for kind, n in phases.items()}) as advance:
        with tiled(refiner.vae, lambda kind: advance(f"{kind} {job.label}")):
            return refiner(
                job.prompt,
                image=image.resize(job.size, Image.Resampling.LANCZOS),
                width=job.size[0],
                height=job.size[1],
                strength=job.switches.strength,
                num_inference_steps=job.switches.schedule,
                generator=torch.Generator().manual_seed(job.seed),
                callback_on_step_end=step_callback(lambda: advance(f"denoise {job.label}")),
                **{**job.preset.arguments, **job.preset.refine_arguments},
            ).images[0]


def _redraw(
    pipe: Any, job: ImageJob, image: Image.Image, codec: LatentCodec, timing: Timing
) -> Image.Image:
    """Runs the phases of `refine_image` in a pipeline without an image-to-image twin."""
    tiles, steps = tile_count(*job.size), job.switches.executed_steps
    phases = {"encode": tiles, "denoise": steps, "decode": tiles}
    with timing.phases({f"{kind} {job.label}": n for kind, n in phases.items()}) as advance:
        with tiled(pipe.vae, lambda kind: advance(f"{kind} {job.label}")):
            large = image.resize(job.size, Image.Resampling.LANCZOS)
            clean = codec.encode(pipe.vae, _pixels(large))
            scheduler = late_scheduler(
                pipe, job, Arrangement(codec, denoiser(pipe), clean),
                lambda: advance(f"denoise {job.label}"),
            )  # fmt: skip
            with started_from(pipe, scheduler, clean, codec), at_size(pipe, job.size):
                output = pipe(
                    prompt=job.prompt,
                    width=job.size[0],
                    height=job.size[1],
                    num_inference_steps=job.switches.schedule,
                    generator=torch.Generator().manual_seed(job.seed),
                    **{**job.preset.arguments, **job.preset.refine_arguments},
                )
    return _picture(output)


def _pixels(image: Image.Image) -> torch.Tensor:
    """A picture, RGB, as (1, 3, H, W) in [-1, 1]."""
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image)) * 2 - 1


def late_scheduler(
    pipe: Any, job: ImageJob, arrangement: Arrangement, on_step: Callable[[], None]
) -> Any:
    """Returns the scheduler of a stage that starts from a picture."""
    scheduler = starting_late(scheduler_for(pipe, job), job.switches.strength, on_step)
    if isinstance(scheduler, LowFrequencyGuidance):
        scheduler.arrangement = arrangement
    return scheduler


def native_drawing(
    pipe: Any, preset: Preset, steps: int | None = None
) -> Callable[[Sequence[str], Sequence[int]], list[Image.Image]]:
    """Returns a function that draws prompts with seeds, one picture each, at native size.

    Args:
        pipe: A stock text-to-image pipeline, with whatever is attached to it.
        preset: How it is called.
        steps: Denoising steps, the preset's by default.
    """
    size = (preset.native, preset.native)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        jobs = [
            ImageJob(prompt, size, preset, steps=steps, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [_sample(pipe, job, Timing()) for job in jobs]

    return draw
