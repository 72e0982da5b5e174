"""Keeps the composition of a picture while its detail is redrawn: low-frequency guidance.

While an enlarged picture is denoised, the low frequencies of each predicted clean picture are
drawn towards those of the enlarged one; the high frequencies stay free. Strongly at first, by a
cosine to nothing at the end. After "I-Max: Maximize the Resolution Potential of Pre-trained
Rectified Flow Transformers with Projected Flow" (Du et al., 2024,
https://arxiv.org/abs/2410.07536).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor


class LowFrequencyScheduler(FlowMatchEulerDiscreteScheduler):
    """A flow scheduler that guides an image-to-image run by the picture that it starts from.

    The reference is what the pipeline noises before the first step.

    Attributes:
        weight: Share of the low frequencies that the reference decides at the first step, 0 to 1.
        levels: Low frequencies are means over 2 ** levels latent elements and axis.
    """

    weight: float = 0.0
    levels: int = 1
    _reference: Tensor | None = None

    @classmethod
    def guided(cls, config: dict[str, Any], weight: float, levels: int) -> LowFrequencyScheduler:
        """Builds the scheduler from the configuration of a plain one."""
        scheduler = cls.from_config(config)
        scheduler.weight, scheduler.levels = weight, levels
        return scheduler

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noises the reference, and remembers it."""
        self._reference = sample
        return super().scale_noise(sample, timestep, noise)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        """Takes a step with the guided velocity."""
        if self._reference is not None and self.weight > 0:
            if self.step_index is None:
                self._init_step_index(timestep)
            model_output = self._guided(model_output, sample)
        return super().step(model_output, timestep, sample, **options)

    def weight_at(self, index: int) -> float:
        """The weight at a step of the schedule: from `weight` at the first executed one to 0."""
        first = self.begin_index or 0
        steps = max(1, len(self.timesteps) - first)
        return self.weight * (1 + math.cos(math.pi * (index - first) / steps)) / 2

    def _guided(self, velocity: Tensor, sample: Tensor) -> Tensor:
        sigma = self.sigmas[self.step_index].to(sample.device)
        shape = self._reference.shape
        clean = unpacked(sample.float() - sigma * velocity.float(), shape)
        drift = low_frequencies(clean - self._reference.float(), self.levels)
        pull = self.weight_at(self.step_index) * packed_like(drift, sample) / sigma
        return (velocity.float() + pull).to(velocity.dtype)


def low_frequencies(latents: Tensor, levels: int) -> Tensor:
    """Projects (B, C, h, w) on what is constant over blocks of 2 ** levels elements and axis."""
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
