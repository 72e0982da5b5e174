"""What the switches of a `Refinement` do to a pipeline: attention, positions, noise schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import exp, sqrt
from typing import Any

from diffaccel.attach.attachment import Attachment, set_attn_processor
from diffaccel.bindings.rope import Axis, Ntk, Yarn, scaled_rope
from diffaccel.errors import InputError
from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.low_frequency import guided_scheduler
from diffaccel.pipelines.image.preset import Preset
from diffaccel.pipelines.image.presets import denoiser
from diffaccel.pipelines.windows import throughout


@contextmanager
def beyond_native(pipe: Any, job: ImageJob) -> Iterator[Attachment]:
    """Attaches the method and scales positions for one size, and undoes both afterwards.

    Args:
        pipe: The pipeline that runs: methods that follow the schedule read it from its scheduler.
        job: What is drawn, and how.

    Raises:
        InputError: A switch does not suit the model.
    """
    with scaled_positions(pipe, job):
        method = throughout(job.attention)
        with set_attn_processor(pipe, method, always=not job.is_for_speed) as attachment:
            yield attachment


def scaled_positions(pipe: Any, job: ImageJob) -> Any:
    """A context in which rotary positions are scaled to a size; nothing for rope "plain"."""
    if job.switches.rope == "plain":
        return nullcontext()
    model = denoiser(pipe)
    width, height = (axis_of(job, side) for side in job.size)
    return scaled_rope(model, height=height, width=width)


def axis_of(job: ImageJob, side: int) -> Axis:
    """How the positions along one side, in pixels, are scaled."""
    native = job.preset.native
    factor = max(1.0, side / native)
    if job.switches.rope == "yarn":
        return Yarn(factor, native // job.preset.token)
    return Ntk(factor)


def scheduler_for(pipe: Any, job: ImageJob) -> Any:
    """Copies the scheduler as the switches `shift` and `guidance` ask.

    A shift that grows with size by itself stops at its largest trained value: flow models
    extrapolate it linearly in tokens, and at 4096x4096 it would leave no step below pure noise.

    Raises:
        InputError: The scheduler has no shift, or cannot be guided.
    """
    refinement, pixels = job.switches, job.size[0] * job.size[1]
    config = dict(pipe.scheduler.config)
    config.pop("_use_default_values", None)  # diffusers would put the defaults back
    has_shift = "shift" in config  # those of flow models alone have it
    if "max_image_seq_len" in config:
        tokens = pixels // job.preset.token**2
        config["max_image_seq_len"] = max(tokens, config["max_image_seq_len"])
    if refinement.shift is not None:
        if not has_shift and not config.get("use_flow_sigmas"):
            raise InputError(
                "shift is for the noise schedules of flow models, got "
                f"{type(pipe.scheduler).__name__}; leave it out"
            )
        shift = refinement.shift
        if shift == "size":
            growth = sqrt(max(1.0, pixels / job.preset.native**2))
            shift = native_shift(config, job.preset) * growth
        config["shift" if has_shift else "flow_shift"] = shift
        if "use_dynamic_shifting" in config:
            config["use_dynamic_shifting"] = False
    if refinement.guidance > 0 and not refinement.direct:
        return guided_scheduler(
            pipe.scheduler, config, refinement.guidance, refinement.guidance_levels
        )
    return type(pipe.scheduler).from_config(config)


def native_shift(config: dict[str, Any], preset: Preset) -> float:
    """The shift of a flow schedule at the model's native size.

    A schedule whose shift grows with size (FLUX) has its largest trained one there; one that
    grows linearly with the side (CogView4, GLM-Image) has what their pipelines compute.
    """
    if not config.get("use_dynamic_shifting"):
        return config["shift"] if "shift" in config else config["flow_shift"]
    if preset.shift is not None:
        return preset.shift
    if config.get("time_shift_type") == "linear":
        side = preset.native / preset.token / sqrt(config["base_image_seq_len"])
        return side * config["max_shift"] + config["base_shift"]
    return exp(config["max_shift"])
