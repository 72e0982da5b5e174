"""Keeps the composition of a picture while its detail is redrawn: low-frequency guidance.

While an enlarged picture is denoised, the low frequencies of each predicted clean picture are
drawn towards those of the enlarged one; the high frequencies stay free. Strongly at first, by a
cosine to nothing at the end. After "I-Max: Maximize the Resolution Potential of Pre-trained
Rectified Flow Transformers with Projected Flow" (Du et al., 2024,
https://arxiv.org/abs/2410.07536), carried over from velocities to models that predict noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, SchedulerMixin
from torch import Tensor

from diffaccel.errors import InputError
from diffaccel.pipelines.redraw.latents import LatentCodec

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
"""Schedulers whose samples are (1 - sigma) * picture + sigma * noise, for velocities."""
NOISE_SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers whose samples are picture + sigma * noise."""
VARIANCE_PRESERVING = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "CogVideoXDDIMScheduler"
)  # fmt: skip
"""Schedulers whose samples are sqrt(a) * picture + sqrt(1 - a) * noise, a = alphas_cumprod."""
RATIO_PRESERVING = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""The same with a = 1 / (1 + sigma ** 2), or with a flow schedule as `FLOW`."""
GUIDED = FLOW + NOISE_SCALED + VARIANCE_PRESERVING + RATIO_PRESERVING


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """How a pipeline holds its latents, and the latents that it starts from.

    Attributes:
        codec: How it holds them.
        model: Its denoiser.
        latents: (B, C, h, w) or (B, C, F, h, w), normalised.
    """

    codec: LatentCodec
    model: Any
    latents: Tensor


_Scheduler: Any = object
"""Stands for the scheduler behind the mixin, one of `GUIDED`."""


class LowFrequencyGuidance(_Scheduler):
    """Turns a scheduler into one that guides an image-to-image run by the picture it starts from.

    A mixin in front of a diffusers scheduler. The reference is what the pipeline noises before the
    first step. Whatever the model predicts (velocity, noise, v or the picture itself) is moved so
    that the clean picture that follows from it has the wanted low frequencies.

    Attributes:
        guides: Name of the scheduler class behind it, one of `GUIDED`.
        weight: Share of the low frequencies that the reference decides at the first step, 0 to 1.
        levels: Low frequencies are means over 2 ** levels latent elements and axis.
        arrangement: How the pipeline holds its latents, where that is neither (B, C, h, w) nor
            the tokens of FLUX.
    """

    guides: ClassVar[str]
    weight: float = 0.0
    levels: int = 1
    arrangement: Arrangement | None = None
    _reference: Tensor | None = None
    _first_timestep: float | None = None

    @classmethod
    def guided(cls, config: dict[str, Any], weight: float, levels: int) -> LowFrequencyGuidance:
        """Builds the scheduler from the configuration of a plain one."""
        scheduler = cls.from_config(config)
        scheduler.weight, scheduler.levels = weight, levels
        return scheduler

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noises the reference, and remembers it."""
        self._remember(original_samples, timesteps)
        return super().add_noise(original_samples, noise, timesteps)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        """Takes a step with the guided prediction."""
        if self._reference is not None and self.weight > 0:
            model_output = self._guided(self._reference, model_output, timestep, sample)
        return super().step(model_output, timestep, sample, **options)

    def weight_at(self, index: int) -> float:
        """The weight at a step of the schedule: from `weight` at the first executed one to 0."""
        first = getattr(self, "begin_index", None) or 0
        if self._first_timestep is not None:
            first = self._index_of(self._first_timestep)
        steps = max(1, len(self.timesteps) - first)
        return self.weight * (1 + math.cos(math.pi * (index - first) / steps)) / 2

    def clean(self, prediction: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """The clean picture that a prediction means, fp32."""
        signal, noise = self._levels_of(self._index_of(timestep), timestep)
        sample, prediction = sample.float(), prediction.float()
        kind = self._prediction_type()
        if kind == "sample":
            return prediction
        if kind == "v_prediction":
            size = math.hypot(signal, noise)  # the model sees sample / size
            return (signal * sample / size - noise * prediction) / size
        return (sample - noise * prediction) / signal

    def _moved(self, prediction: Tensor, timestep: Tensor, drift: Tensor) -> Tensor:
        """A prediction whose clean picture is less by `drift`."""
        signal, noise = self._levels_of(self._index_of(timestep), timestep)
        factor = {"sample": -1.0, "v_prediction": math.hypot(signal, noise) / noise}
        return prediction.float() + factor.get(self._prediction_type(), signal / noise) * drift

    def _levels_of(self, index: int, timestep: Tensor) -> tuple[float, float]:
        """Factors on the picture and on the noise in a sample."""
        if self._prediction_type() == "flow_prediction":
            # The velocity counts as noise of a sample that is picture + sigma * velocity.
            return 1.0, float(self.sigmas[index])
        if self.guides in NOISE_SCALED:
            return 1.0, float(self.sigmas[index])
        if self.guides in RATIO_PRESERVING:
            share = 1.0 / (1.0 + float(self.sigmas[index]) ** 2)
        else:
            share = float(self.alphas_cumprod[int(timestep)])
        return math.sqrt(share), math.sqrt(1.0 - share)

    def _prediction_type(self) -> str:
        return self.config.prediction_type.replace("original_sample", "sample")

    def _guided(
        self, reference: Tensor, prediction: Tensor, timestep: Tensor, sample: Tensor
    ) -> Tensor:
        clean, held = self.clean(prediction, timestep, sample), self.arrangement
        if held is None:
            clean = unpacked(clean, reference.shape)
        else:
            clean = held.codec.unpack(clean, reference, held.model)
        drift = low_frequencies(clean - reference.float(), self.levels)
        drift = packed_like(drift, sample) if held is None else held.codec.pack(drift, held.model)
        drift = self.weight_at(self._index_of(timestep)) * drift.reshape(sample.shape)
        return self._moved(prediction, timestep, drift).to(prediction.dtype)

    def _remember(self, reference: Tensor, timesteps: Tensor) -> None:
        if self.arrangement is not None:
            reference = self.arrangement.latents.to(reference.device)
        elif reference.ndim == 5:
            reference = reference.flatten(1, 2)  # Qwen-Image has an axis of one frame.
        self._reference = reference
        self._first_timestep = float(timesteps.flatten()[0])

    def _index_of(self, timestep: Tensor | float) -> int:
        """Where a timestep stands in the schedule."""
        return int((self.timesteps.float() - float(timestep)).abs().argmin())


class LowFrequencyFlow(LowFrequencyGuidance):
    """The same for those of `FLOW`: FLUX, SD3, Qwen-Image, HiDream."""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noises the reference, and remembers it."""
        self._remember(sample, timestep)
        return super().scale_noise(sample, timestep, noise)

    def _levels_of(self, index: int, timestep: Tensor) -> tuple[float, float]:
        return 1.0, float(self.sigmas[index])

    def _prediction_type(self) -> str:
        return "flow"  # sample - sigma * velocity is the picture, as with noise of scale sigma


def guided_scheduler(
    scheduler: SchedulerMixin, config: dict[str, Any], weight: float, levels: int
) -> LowFrequencyGuidance:
    """Builds a guided twin of a scheduler.

    Args:
        scheduler: One of `GUIDED`.
        config: Its configuration, with changes where wanted.
        weight: Share of the low frequencies that the reference decides at the first step.
        levels: Low frequencies are means over 2 ** levels latent elements and axis.

    Raises:
        InputError: The scheduler is none of these, or one of them with a flow schedule.
    """
    kind: Any = type(scheduler)
    if kind.__name__ in FLOW:
        return _guided_class(kind).guided(config, weight, levels)
    is_flow = "flow" in str(config.get("prediction_type")) or config.get("use_flow_sigmas")
    is_known_flow = kind.__name__ in RATIO_PRESERVING and (
        config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    )
    if kind.__name__ not in GUIDED or (is_flow and not is_known_flow):
        raise InputError(
            f"low-frequency guidance knows the schedulers {', '.join(GUIDED)}, got "
            f"{kind.__name__}{' with a flow schedule' if is_flow else ''}; set pipe.scheduler to "
            "one of them, or use guidance 0"
        )
    return _guided_class(kind).guided(config, weight, levels)


@cache
def _guided_class(kind: type[SchedulerMixin]) -> type[LowFrequencyGuidance]:
    """The one subclass of a scheduler class that is guided.

    Its step keeps its signature, by which pipelines decide whether to pass their generator.
    """
    name, behind = kind.__name__, cast(Any, kind)

    @wraps(behind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LowFrequencyGuidance.step(self, *args, **kwargs)

    guidance = LowFrequencyFlow if name in FLOW else LowFrequencyGuidance
    return type(f"LowFrequency{name}", (guidance, kind), {"guides": name, "step": step})


def low_frequencies(latents: Tensor, levels: int) -> Tensor:
    """Projects (B, C, h, w) on what is constant over blocks of 2 ** levels elements and axis.

    Of (B, C, F, h, w), each frame.
    """
    if latents.ndim == 5:
        frames = low_frequencies(latents.transpose(1, 2).flatten(0, 1), levels)
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
    size = 2**levels
    means = F.avg_pool2d(latents, size, ceil_mode=True, count_include_pad=False)
    spread = means.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return spread[..., : latents.shape[2], : latents.shape[3]]


def unpacked(latents: Tensor, shape: torch.Size) -> Tensor:
    """Arranges the tokens (B, N, 4 C) of FLUX as latents (B, C, h, w); leaves others alone."""
    if latents.ndim != 3:
        return latents
    batch, channels, height, width = shape
    grid = latents.view(batch, height // 2, width // 2, channels, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def packed_like(latents: Tensor, sample: Tensor) -> Tensor:
    """Arranges latents (B, C, h, w) as `sample` is."""
    return latents if sample.ndim == 4 else FluxPipeline._pack_latents(latents, *latents.shape)
