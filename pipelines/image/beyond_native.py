"""What the switches of a `Refinement` do to a pipeline: attention, positions, noise schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import exp, sqrt
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

from diffaccel.attach.attachment import Attachment, set_attn_processor
from diffaccel.bindings import UnsupportedModelError
from diffaccel.bindings.rope import Axis, Ntk, Yarn, scaled_rope
from diffaccel.errors import InputError
from diffaccel.methods import JitteredAttn, Method, NeighborhoodAttn, ProportionalAttn
from diffaccel.methods.windows.sliding import SlidingWindowAttn
from diffaccel.pipelines.image.low_frequency import guided_scheduler
from diffaccel.pipelines.image.presets import Preset
from diffaccel.pipelines.image.recipe import Refinement

MULTIPLE = 16  # pixels per token and axis in the latent models
Size = tuple[int, int]


def method_with(method: Method, preset: Preset, refinement: Refinement, seed: int = 0) -> Method:
    """Wraps a method as the switches `jitter` and `proportional` ask.

    Args:
        method: The attention.
        preset: Tells how many tokens the model was trained on.
        refinement: The switches.
        seed: Of the jitter.

    Raises:
        InputError: The method has no borders to jitter.
    """
    if refinement.jitter:
        if not isinstance(method, NeighborhoodAttn | SlidingWindowAttn):
            raise InputError(
                "jitter moves the borders of windows, which NeighborhoodAttn and "
                f"SlidingWindowAttn have, got {type(method).__name__}; choose another method or "
                "leave the jitter out"
            )
        method = JitteredAttn(method, seed)
    if refinement.proportional:
        trained = None  # joint sequences have one size, the levels of a U-Net say theirs
        if preset.text:
            trained = (preset.native // MULTIPLE) ** 2 + preset.text
        method = ProportionalAttn(method, trained)
    return method


@contextmanager
def beyond_native(
    pipe: DiffusionPipeline,
    size: Size,
    preset: Preset,
    method: Method,
    refinement: Refinement,
    seed: int = 0,
) -> Iterator[Attachment]:
    """Attaches the method and scales positions for one size, and undoes both afterwards.

    Args:
        pipe: The pipeline.
        size: (width, height) in pixels.
        preset: Its preset.
        method: The attention.
        refinement: The switches.
        seed: Of the jitter.

    Raises:
        InputError: A switch does not suit the model or the method.
    """
    wrapped = method_with(method, preset, refinement, seed)
    with scaled_positions(pipe, size, preset.native, refinement):
        with set_attn_processor(pipe, wrapped) as attachment:
            yield attachment


def scaled_positions(
    pipe: DiffusionPipeline, size: Size, native: int, refinement: Refinement
) -> Any:
    """A context in which rotary positions are scaled to a size; nothing for rope "plain"."""
    if refinement.rope == "plain":
        return nullcontext()
    model = getattr(pipe, "transformer", None)
    if model is None or type(model).__name__ != "FluxTransformer2DModel":
        raise UnsupportedModelError(
            "rotary positions of images can be scaled in FluxTransformer2DModel, got "
            f"{type(pipe).__name__}; use rope plain"
        )
    width, height = (axis_of(refinement, side, native) for side in size)
    return scaled_rope(model, height=height, width=width)


def axis_of(refinement: Refinement, side: int, native: int) -> Axis:
    """How the positions along one side, in pixels, are scaled."""
    factor = max(1.0, side / native)
    if refinement.rope == "yarn":
        return Yarn(factor, native // MULTIPLE)
    return Ntk(factor)


def scheduler_for(pipe: DiffusionPipeline, size: Size, native: int, refinement: Refinement) -> Any:
    """Copies the scheduler as the switches `shift` and `guidance` ask.

    A shift that grows with size by itself stops at its largest trained value: flow models
    extrapolate it linearly in tokens, and at 4096x4096 it would leave no step below pure noise.

    Raises:
        InputError: The scheduler has no shift, or cannot be guided.
    """
    tokens = size[0] * size[1] // MULTIPLE**2
    config = dict(pipe.scheduler.config)
    config.pop("_use_default_values", None)  # diffusers would put the defaults back
    is_flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    if is_flow:
        config["max_image_seq_len"] = max(tokens, config["max_image_seq_len"])
    if refinement.shift is not None:
        if not is_flow:
            raise InputError(
                "shift is for the noise schedules of flow models, got "
                f"{type(pipe.scheduler).__name__}; leave it out"
            )
        shift = refinement.shift
        if shift == "size":
            shift = native_shift(config) * sqrt(max(1.0, size[0] * size[1] / native**2))
        config |= {"shift": shift, "use_dynamic_shifting": False}
    if refinement.guidance > 0 and not refinement.direct:
        return guided_scheduler(
            pipe.scheduler, config, refinement.guidance, refinement.guidance_levels
        )
    return type(pipe.scheduler).from_config(config)


def native_shift(config: dict[str, Any]) -> float:
    """The shift of a flow schedule at the model's native size.

    A schedule whose shift grows with size (FLUX) has its largest trained one there.
    """
    if config.get("use_dynamic_shifting"):
        return exp(config["max_shift"])
    return config["shift"]
