"""Generates videos of any size with Wan: native sample, then one refinement with windows.

The native sample decides what happens where; the refinement redraws it at full size, see
`diffaccel.pipelines.video.freeswim`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffaccel.attach.report import Report
from diffaccel.bindings import binding_of
from diffaccel.bindings.rope import Axis, scaled_rope
from diffaccel.errors import InputError
from diffaccel.pipelines.video.freeswim import FreeSwim, refine_latents
from diffaccel.pipelines.video.wan import decode_video, encode_conditions, encode_video, tiled_vae
from diffaccel.progress import Timing, step_callback


@dataclass(frozen=True, slots=True)
class GeneratedVideo:
    """Videos and how they came about.

    Attributes:
        frames: (B, F, 3, height, width) fp32 in [0, 1].
        native: Size in pixels (width, height) of the first stage.
        seconds: Phase name to wall-clock seconds.
        reports: Transformer name to what the windows did, empty without refinement.
    """

    frames: Tensor
    native: tuple[int, int]
    seconds: dict[str, float]
    reports: dict[str, Report] = field(default_factory=dict)


def check_video_size(pipe: DiffusionPipeline, width: int, height: int, frames: int) -> None:
    """Raises InputError unless a Wan pipeline can make a video of this size."""
    multiple = pixels_per_token(pipe)
    if min(width, height) < 1 or width % multiple or height % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise InputError(
            f"width and height must be positive multiples of {multiple}, got {width}x{height}; "
            f"use {near[0]}x{near[1]}"
        )
    step = pipe.vae_scale_factor_temporal
    if frames < 1 or frames % step != 1 % step:
        raise InputError(
            f"frames must be 1 more than a multiple of {step}, got {frames}; use "
            f"{max(0, round((frames - 1) / step)) * step + 1}"
        )


def pixels_per_token(pipe: DiffusionPipeline) -> int:
    """Side in pixels of the square that one token shows."""
    return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]


def native_size(pipe: DiffusionPipeline, width: int, height: int) -> tuple[int, int]:
    """Returns the size (width, height) of native area with the aspect of another, in pixels."""
    binding, multiple = binding_of(pipe.transformer), pixels_per_token(pipe)
    _, rows, columns = binding.native(pipe.transformer, binding.layers(pipe.transformer)[0])
    shrink = min(1.0, sqrt(rows * columns * multiple**2 / (width * height)))
    return tuple(max(multiple, round(s * shrink / multiple) * multiple) for s in (width, height))


def generate_video(
    pipe: DiffusionPipeline,
    prompt: str | list[str],
    width: int,
    height: int,
    frames: int,
    *,
    negative_prompt: str | None = None,
    image: Image.Image | None = None,
    video: Tensor | None = None,
    native: tuple[int, int] | None = None,
    steps: int = 50,
    recipe: FreeSwim | None = None,
    positions: Axis | None = None,
    seed: int = 0,
    timing: Timing | None = None,
    **prompt_embeds: Tensor,
) -> GeneratedVideo:
    """Generates one video per prompt.

    Args:
        pipe: A stock Wan pipeline, text to video or image to video.
        prompt: What happens; several make a batch.
        width: In pixels, a multiple of `pixels_per_token` (16, for Wan 2.2 5B 32).
        height: In pixels, a multiple of the same.
        frames: 1 more than a multiple of 4.
        negative_prompt: What must not be seen.
        image: First frame, with an image-to-video pipeline.
        video: (B, F, 3, h, w) in [0, 1], refined in place of a native sample.
        native: Size (width, height) of the native sample; by default the model's own area.
        steps: Denoising steps of the native sample.
        recipe: How to go above native size.
        positions: How rotary positions along time change, for more frames than the model knows.
        seed: Of all noise.
        timing: Where phases are timed and drawn.
        prompt_embeds: `prompt_embeds` and `negative_prompt_embeds` in place of the prompts.

    Raises:
        InputError: A size breaks the rule of `check_video_size`.
        UnsupportedModelError: The denoiser is not of Wan.
    """
    check_video_size(pipe, width, height, frames)
    recipe, timing = recipe or FreeSwim(), timing or Timing()
    native = native or native_size(pipe, width, height)
    told = {"prompt": prompt, "negative_prompt": negative_prompt}
    if prompt_embeds:
        told = dict(prompt_embeds)
    with _positions_along_time(pipe, positions):
        if video is None:
            told_image = {} if image is None else {"image": image}
            video = _sample_native(
                pipe, told | told_image, native, frames, steps, recipe.guidance_scale, seed, timing
            )
        return _enlarge(pipe, told, width, height, video, image, recipe, native, seed, timing)


def _enlarge(
    pipe: DiffusionPipeline,
    told: dict[str, Any],
    width: int,
    height: int,
    video: Tensor,
    image: Image.Image | None,
    recipe: FreeSwim,
    native: tuple[int, int],
    seed: int,
    timing: Timing,
) -> GeneratedVideo:
    """Refines a video (B, F, 3, h, w) at full size, unless it has that already."""
    if video.shape[-2:] == (height, width):
        return GeneratedVideo(video, native, timing.seconds)
    generator = torch.Generator().manual_seed(seed + 1)
    label, device = f"{width}x{height}", pipe._execution_device
    phases = {f"encode {label}": 1, f"denoise {label}": recipe.executed_steps,
              f"decode {label}": 1}  # fmt: skip
    with timing.phases(phases) as advance, tiled_vae(pipe.vae), torch.no_grad():
        large = F.interpolate(video.flatten(0, 1), (height, width), mode="bilinear")
        large = large.unflatten(0, video.shape[:2]).transpose(1, 2) * 2 - 1
        latents = encode_video(pipe, large.to(device))
        conditions = encode_conditions(
            pipe, told, recipe.guidance_scale, image, latents, video.shape[1]
        )
        advance(f"encode {label}")
        latents, reports = refine_latents(
            pipe, latents, conditions, recipe, generator=generator,
            on_step=lambda: advance(f"denoise {label}"),
        )  # fmt: skip
        result = decode_video(pipe, latents)
        pipe.maybe_free_model_hooks()
        advance(f"decode {label}")
    return GeneratedVideo(result, native, timing.seconds, reports)


def _positions_along_time(pipe: DiffusionPipeline, positions: Axis | None) -> ExitStack:
    """Scales rotary positions along time in every transformer, for a `with` block."""
    stack = ExitStack()
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if positions is not None and model is not None:
            stack.enter_context(scaled_rope(model, frames=positions))
    return stack


def _sample_native(
    pipe: DiffusionPipeline,
    told: dict[str, Any],
    size: tuple[int, int],
    frames: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    timing: Timing,
) -> Tensor:
    """Samples (B, F, 3, h, w) in [0, 1] with the stock pipeline."""
    name = f"sample {size[0]}x{size[1]}"
    with timing.phases({name: steps}) as advance:
        return pipe(
            **told,
            width=size[0],
            height=size[1],
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            callback_on_step_end=step_callback(lambda: advance(name)),
        ).frames.float()
