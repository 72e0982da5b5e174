"""Generates videos of any size and length.

Beyond native size, a native sample decides what happens where, and refinements with windows redraw
it, see `diffaccel.pipelines.video.freeswim` for Wan and `diffaccel.pipelines.video.stock` for the
other families; beyond native length, windows along time are denoised together, see
`diffaccel.pipelines.video.long_video` and `diffaccel.pipelines.video.windowed_calls`.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.attach.attachment import denoisers
from diffaccel.attach.caches import caches_of, refuse_caches
from diffaccel.attach.report import Report
from diffaccel.bindings import binding_of
from diffaccel.bindings.rope import scaled_rope
from diffaccel.errors import InputError, ModelError
from diffaccel.pipelines.redraw.late_start import check_startable
from diffaccel.pipelines.seed import seeded
from diffaccel.pipelines.video.families import REFUSED, VIDEO_FAMILIES, VideoFamily
from diffaccel.pipelines.video.freeswim import FreeSwim, refine_latents
from diffaccel.pipelines.video.job import VideoJob
from diffaccel.pipelines.video.long_video import TimeWindows, denoise_windows
from diffaccel.pipelines.video.run import Clip, run_clip
from diffaccel.pipelines.video.stock import refine_with
from diffaccel.pipelines.video.wan import (
    TRANSFORMERS,
    decode_video,
    encode_conditions,
    encode_video,
    tiled_vae,
)
from diffaccel.pipelines.video.windowed_calls import WindowedCalls
from diffaccel.progress import Timing, counting_steps, step_callback


@dataclass(frozen=True, slots=True)
class GeneratedVideo:
    """Videos and how they came about.

    Attributes:
        frames: (B, F, 3, height, width) fp32 in [0, 1].
        native: Size in pixels (width, height) of the first stage.
        seconds: Phase name to wall-clock seconds.
        reports: Transformer name to what the windows did, empty without refinement.
        audio: The sound (B, channels, samples) in [-1, 1], where the model makes one.
        sampling_rate: Its samples per second, 0 without sound.
    """

    frames: Tensor
    native: tuple[int, int]
    seconds: dict[str, float]
    reports: dict[str, Report] = field(default_factory=dict)
    audio: Tensor | None = None
    sampling_rate: int = 0


def check_video_size(pipe: Any, width: int, height: int, frames: int) -> None:
    """Raises InputError unless a pipeline can make a video of this size."""
    multiple = pixels_per_token(pipe)
    if min(width, height) < 1 or width % multiple or height % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise InputError(
            f"width and height must be positive multiples of {multiple}, got {width}x{height}; "
            f"use {near[0]}x{near[1]}"
        )
    family = family_of(pipe)
    step = frame_step(pipe) * (1 if family is None else family.latent_step)
    if frames < 1 or frames % step != 1 % step:
        raise InputError(
            f"frames must be 1 more than a multiple of {step}, got {frames}; use "
            f"{max(0, (frames - 1 + step // 2) // step) * step + 1}"
        )


def pixels_per_token(pipe: Any) -> int:
    """Side in pixels of the square that one token shows."""
    family = family_of(pipe)
    if family is not None:
        return family.multiple
    return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]


def frame_step(pipe: Any) -> int:
    """Frames per latent frame."""
    family = family_of(pipe)
    return pipe.vae_scale_factor_temporal if family is None else family.frame_step


def latent_size(pipe: Any, size: tuple[int, int], frames: int) -> tuple[int, int, int]:
    """Returns the latents of a video, (frames, rows, columns) in elements."""
    length = (frames - 1) // frame_step(pipe) + 1
    model = pipe.denoisers["unet"] if "unet" in pipe.denoisers else pipe.transformer
    patch = model.config.get("patch_size") or 1
    side = patch if isinstance(patch, int) else patch[-1]
    multiple = pixels_per_token(pipe)
    return length, size[1] // multiple * side, size[0] // multiple * side


def family_of(pipe: Any) -> VideoFamily | None:
    """Returns how a stock pipeline other than Wan is called, None for Wan."""
    return VIDEO_FAMILIES.get(getattr(pipe, "class_name", type(pipe).__name__))


def native_size(pipe: Any, width: int, height: int) -> tuple[int, int]:
    """Returns the size (width, height) of native area with the aspect of another, in pixels."""
    multiple, family = pixels_per_token(pipe), family_of(pipe)
    if family is not None:
        area = family.native[0] * family.native[1]
    else:
        binding = binding_of(pipe.transformer)
        grid = binding.native(pipe.transformer, binding.layers(pipe.transformer)[0])
        if grid is None:
            return width, height
        area = grid[1] * grid[2] * multiple**2
    shrink = min(1.0, sqrt(area / (width * height)))
    across, down = (
        max(multiple, round(side * shrink / multiple) * multiple) for side in (width, height)
    )
    return across, down


def generate_video(pipe: Any, job: VideoJob, *, timing: Timing | None = None) -> GeneratedVideo:
    """Generates one video per prompt.

    Args:
        pipe: A stock pipeline of Wan, text to video or image to video, or one of
            `diffaccel.pipelines.video.families`.
        job: What happens, and how it is made.
        timing: Where phases are timed and drawn.

    Raises:
        InputError: A size breaks the rule of `check_video_size`, or windows along time are asked
            of a model that starts from an image or makes sound, or the pipeline is unknown.
        UnsupportedModelError: The denoiser's attention is not known.
        ModelError: The pipeline cleans its prompts with a package that is not installed, or a
            cache of its denoiser cannot follow what is done beyond the native size.
    """
    width, height = job.size
    check_pipeline(pipe)
    check_video_size(pipe, width, height, job.frames)
    _check_cleaning(pipe, job)
    _check_caches(pipe, job)
    timing = timing or Timing()
    family = family_of(pipe)
    with seeded(pipe, job.seed):
        if family is not None:
            return _generate_with_stock(pipe, job, family, timing)
        if isinstance(job.recipe, TimeWindows):
            return _denoise_in_windows(pipe, job, job.recipe, timing)
        return _generate_beyond_native(pipe, job, job.recipe, timing)


def _generate_beyond_native(
    pipe: Any, job: VideoJob, recipe: FreeSwim, timing: Timing
) -> GeneratedVideo:
    """Generates at native size, and redraws in each larger stage."""
    width, height = job.size
    with _positions_along_time(pipe, job):
        native = job.native or native_size(pipe, width, height)
        video = job.video
        if video is None:
            video = _sample_native(pipe, job, recipe, native, timing)
        reports: dict[str, Report] = {}
        for stage in job.stages((video.shape[-1], video.shape[-2]), pixels_per_token(pipe)):
            video, found = _enlarge(pipe, stage, recipe, video, timing)
            reports |= job.labelled(stage, found)
        return GeneratedVideo(video, native, timing.seconds, reports)


def check_pipeline(pipe: Any) -> None:
    """Raises InputError for pipelines that are neither Wan's nor of the known families."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    if VIDEO_FAMILIES.keys() & names[:1] or {"WanPipeline", "WanImageToVideoPipeline"} & {*names}:
        return
    reason = REFUSED.get(names[0], "how it holds its latents is not known")
    raise InputError(
        f"clips are generated with Wan or one of {', '.join(VIDEO_FAMILIES)}, got {names[0]}: "
        f"{reason}; call it yourself, with set_attn_processor"
    )


def _check_cleaning(pipe: Any, job: VideoJob) -> None:
    """Refuses prompts that diffusers cleans with ftfy, where that is not there: a NameError."""
    names = pipe.encode_prompt.__func__.__globals__
    clean = names.get("basic_clean")
    if clean is None or "ftfy" in names or "prompt" not in job.told:
        return
    used = clean.__code__.co_names
    if "ftfy" in used and "is_ftfy_available" not in used:
        raise ModelError(
            f"{type(pipe).__name__} needs the package ftfy to clean its prompts, and it is not "
            "installed; run pip install ftfy, or pass prompt_embeds"
        )


def _check_caches(pipe: Any, job: VideoJob) -> None:
    """Refuses caches on denoisers that are called otherwise than by the pipeline, in advance."""
    native = job.native or native_size(pipe, *job.size)
    if not isinstance(job.recipe, TimeWindows) and job.video is None and job.size == native:
        return
    for name in TRANSFORMERS:
        model = getattr(pipe, name, None)
        if model is not None:
            why = "what lies beyond the native size or length is made by calls"
            refuse_caches(model, why, caches_of(model))


def _enlarge(
    pipe: Any, job: VideoJob, recipe: FreeSwim, video: Tensor, timing: Timing
) -> tuple[Tensor, dict[str, Report]]:
    """Refines a video (B, F, 3, h, w) at full size."""
    generator = torch.Generator().manual_seed(job.seed + 1)
    label, device = job.label, pipe._execution_device
    phases = {f"encode {label}": 1, f"denoise {label}": recipe.executed_steps,
              f"decode {label}": 1}  # fmt: skip
    with timing.phases(phases) as advance, tiled_vae(pipe.vae), torch.no_grad():
        large = F.interpolate(video.flatten(0, 1), job.size[::-1], mode="bilinear")
        large = large.unflatten(0, video.shape[:2]).transpose(1, 2) * 2 - 1
        latents = encode_video(pipe, large.to(device))
        conditions = encode_conditions(
            pipe, job.told, recipe.guidance_scale, job.image, latents, video.shape[1]
        )
        advance(f"encode {label}")
        latents, reports = refine_latents(
            pipe, latents, conditions, recipe, generator=generator,
            on_step=lambda: advance(f"denoise {label}"),
        )  # fmt: skip
        result = decode_video(pipe, latents)
        pipe.maybe_free_model_hooks()
        advance(f"decode {label}")
    return result, reports


def _generate_with_stock(
    pipe: Any, job: VideoJob, family: VideoFamily, timing: Timing
) -> GeneratedVideo:
    """Generates with the call of a stock pipeline, at native size and in each larger stage."""
    recipe = job.recipe
    if isinstance(recipe, TimeWindows):
        return _sample_in_windows(pipe, job, family, recipe, timing)
    check_startable(pipe)
    if type(pipe).__name__.startswith("Cosmos2_5") and {"image", "video"} & job.call.keys():
        raise InputError(
            f"{type(pipe).__name__} holds given frames by velocities from pure noise, from which "
            "no refinement starts, got a picture; leave it out, or generate at native size"
        )
    with _positions_along_time(pipe, job):
        native = job.native or native_size(pipe, *job.size)
        told = {**job.call, **family.arguments, **guidance_of(pipe, recipe)}
        if job.video is not None:
            clip = Clip(job.video, sound=_given_sound(pipe, told))
        else:
            name = f"sample {native[0]}x{native[1]}"
            with timing.phases({name: job.steps}) as advance:
                sample = told | {
                    "width": native[0],
                    "height": native[1],
                    "num_inference_steps": job.steps,
                    "generator": torch.Generator().manual_seed(job.seed),
                }
                clip = run_clip(pipe, sample | counting_steps(pipe, partial(advance, name)))
        reports: dict[str, Report] = {}
        start = clip.frames.shape[-1], clip.frames.shape[-2]
        for stage in job.stages(start, family.multiple):
            name = f"refine to {stage.label}"
            with timing.phases({name: recipe.executed_steps}) as advance:
                call = told | {"generator": torch.Generator().manual_seed(job.seed + 1)}
                clip, found = refine_with(
                    pipe, call, clip, stage.size, recipe, family, partial(advance, name)
                )
            reports |= job.labelled(stage, found)
        vocoder = getattr(pipe, "vocoder", None)
        rate = 0 if vocoder is None else vocoder.config.output_sampling_rate
        return GeneratedVideo(clip.frames, native, timing.seconds, reports, clip.audio, rate)


def _sample_in_windows(
    pipe: Any, job: VideoJob, family: VideoFamily, windows: TimeWindows, timing: Timing
) -> GeneratedVideo:
    """Generates with the call of a stock pipeline, whose denoiser sees windows along time."""
    check_windows(type(pipe).__name__)
    (model,) = denoisers(pipe).values()
    name = f"denoise {job.label}x{job.frames}"
    call = {
        **job.call, **family.arguments, **guidance_of(pipe, windows), "width": job.size[0],
        "height": job.size[1], "num_inference_steps": job.steps,
        "generator": torch.Generator().manual_seed(job.seed),
    }  # fmt: skip
    with (
        timing.phases({name: job.steps}) as advance,
        WindowedCalls(model, windows, family.frame_axis),
    ):
        clip = run_clip(pipe, call | counting_steps(pipe, partial(advance, name)))
    return GeneratedVideo(clip.frames, job.size, timing.seconds)


def check_windows(class_name: str) -> None:
    """Raises InputError where windows along time are nothing for a pipeline, by its class."""
    family = VIDEO_FAMILIES.get(class_name)
    if family is not None and isinstance(family.windows, str):
        raise InputError(
            f"windows along time do not suit {class_name}: {family.windows}; use FreeSwim, which "
            "goes beyond native size"
        )


def _given_sound(pipe: Any, told: dict[str, Any]) -> Tensor | None:
    """Takes the latents of the sound of a given clip out of the call of a pipeline."""
    if getattr(pipe, "audio_vae", None) is None:
        return None
    sound = told.pop("audio_latents", None)
    if sound is None:
        raise InputError(
            f"{type(pipe).__name__} refines a clip together with its sound, got a clip alone; "
            'pass the latents of its sound as arguments={"audio_latents": ...}'
        )
    return sound


def guidance_of(pipe: Any, recipe: FreeSwim | TimeWindows) -> dict[str, float]:
    """Returns the scale of classifier-free guidance as a pipeline takes it, if it does."""
    known = inspect.signature(type(pipe).__call__).parameters
    return {"guidance_scale": recipe.guidance_scale} if "guidance_scale" in known else {}


def _positions_along_time(pipe: Any, job: VideoJob) -> ExitStack:
    """Scales rotary positions along time in every transformer, for a `with` block."""
    stack = ExitStack()
    for name in TRANSFORMERS:
        model = getattr(pipe, name, None)
        if job.positions is not None and model is not None:
            stack.enter_context(scaled_rope(model, frames=job.positions))
    return stack


def _sample_native(
    pipe: Any, job: VideoJob, recipe: FreeSwim, size: tuple[int, int], timing: Timing
) -> Tensor:
    """Samples (B, F, 3, h, w) in [0, 1] with the stock pipeline."""
    name = f"sample {size[0]}x{size[1]}"
    told = job.told if job.image is None else job.told | {"image": job.image}
    with timing.phases({name: job.steps}) as advance:
        return pipe(
            **told,
            width=size[0],
            height=size[1],
            num_frames=job.frames,
            num_inference_steps=job.steps,
            guidance_scale=recipe.guidance_scale,
            generator=torch.Generator().manual_seed(job.seed),
            output_type="pt",
            callback_on_step_end=step_callback(lambda: advance(name)),
        ).frames.float()


def _denoise_in_windows(
    pipe: Any, job: VideoJob, windows: TimeWindows, timing: Timing
) -> GeneratedVideo:
    """Generates videos of any length at a size that the model knows."""
    config = pipe.transformer.config
    if config.in_channels != config.out_channels:
        raise InputError(
            "windows along time need a text-to-video model, since a given first frame belongs to "
            f"one window alone; got one of {config.in_channels} input channels"
        )
    label = f"{job.label}x{job.frames}"
    with timing.phases({f"denoise {label}": job.steps, f"decode {label}": 1}) as advance:
        sides = (side // pipe.vae_scale_factor_spatial for side in job.size[::-1])
        latents = (job.frames - 1) // pipe.vae_scale_factor_temporal + 1
        noise = torch.randn(
            job.batch, config.in_channels, latents, *sides,
            generator=torch.Generator().manual_seed(job.seed),
        ).to(pipe._execution_device)  # fmt: skip
        conditions = encode_conditions(
            pipe, job.told, windows.guidance_scale, None, noise, job.frames
        )
        x = denoise_windows(
            pipe, noise, conditions, windows, steps=job.steps,
            on_step=lambda: advance(f"denoise {label}"),
        )  # fmt: skip
        with tiled_vae(pipe.vae), torch.no_grad():
            video = decode_video(pipe, x)
        pipe.maybe_free_model_hooks()
        advance(f"decode {label}")
    return GeneratedVideo(video, job.size, timing.seconds)
