"""Videos longer than their model was trained for: overlapping windows along time.

At each step the latents are cut into windows of native length, each is denoised at the positions
that the model knows, and where windows overlap their predictions are averaged, so that
neighbours agree. The cuts move from step to step. This is the test-time recipe of "MagicInfinite"
(Yi et al., 2025, https://arxiv.org/abs/2503.05978) in general form, since its constants are not
published; `diffaccel.bindings.rope.Riflex` stretches positions instead and denoises in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffaccel.attach.caches import caches_of, refuse_caches
from diffaccel.errors import check_kinds
from diffaccel.pipelines.video.wan import (
    TRANSFORMERS,
    Conditions,
    check_guidance_scale,
    guided_velocity,
    model_call,
    shifted_scheduler,
    transformer_at,
)


@dataclass(frozen=True, slots=True)
class TimeWindows:
    """How a long video is cut.

    Args:
        length: Latent frames per window; 21 (81 frames) for Wan 2.1.
        overlap: Latent frames that neighbours share, less than `length`.
        moves: Whether the cuts move by half a stride at every second step.
        guidance_scale: Of classifier-free guidance; 1 runs without the negative prompt.
    """

    length: int = 21
    overlap: int = 8
    moves: bool = True
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.length < 1 or not 0 <= self.overlap < self.length:
            raise ValueError(
                "length must be at least 1 and overlap in 0 to length - 1, got "
                f"length={self.length}, overlap={self.overlap}"
            )
        check_guidance_scale(self.guidance_scale)

    def starts(self, frames: int, step: int) -> list[int]:
        """First latent frame of each window over `frames` latent frames, ascending."""
        last, stride = max(0, frames - self.length), self.length - self.overlap
        offset = stride // 2 if self.moves and step % 2 else 0
        starts = {min(max(start, 0), last) for start in range(-offset, last + stride, stride)}
        return sorted(starts | {0, last})

    def weights(self, frames: int, step: int) -> list[tuple[slice, Tensor]]:
        """Windows with the share (L,) that each has in its frames; shares of a frame sum to 1."""
        length = min(self.length, frames)
        ramp = torch.arange(1, length + 1, dtype=torch.float32)
        taper = torch.minimum(ramp, ramp.flip(0)).clamp(max=max(1, self.overlap))
        total = torch.zeros(frames)
        windows = [slice(start, start + length) for start in self.starts(frames, step)]
        for window in windows:
            total[window] += taper
        return [(window, taper / total[window]) for window in windows]


@torch.no_grad()
def denoise_windows(
    pipe: Any,
    noise: Tensor,
    conditions: Conditions,
    windows: TimeWindows,
    *,
    steps: int = 50,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoises latents of any length.

    Args:
        pipe: A stock Wan text-to-video pipeline.
        noise: (B, C, F, h, w).
        conditions: The text.
        windows: How the latents are cut.
        steps: Denoising steps.
        on_step: Called after each step.

    Raises:
        ModelError: A cache acts on a denoiser.
    """
    for name in TRANSFORMERS:
        if (model := getattr(pipe, name, None)) is not None:
            refuse_caches(model, "windows take turns in the calls", caches_of(model))
    config = pipe.scheduler.config
    scheduler = shifted_scheduler(pipe, config.get("flow_shift", config.get("shift", 1.0)))
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise.float()
    for step, timestep in enumerate(scheduler.timesteps):
        name = transformer_at(pipe, timestep)
        model = getattr(pipe, name)
        velocity = torch.zeros_like(x)
        for window, weights in windows.weights(x.shape[2], step):
            part = model_call(pipe, name, x[:, :, window], timestep, conditions)
            predict = partial(_predict, model, part)
            predicted = guided_velocity(predict, conditions, windows.guidance_scale)
            velocity[:, :, window] += predicted * weights.to(x.device)[:, None, None]
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        on_step()
    return x


def _predict(model: torch.nn.Module, call: dict[str, Any], _prompt: str, text: Tensor) -> Tensor:
    """Predicts the velocity of a window, fp32."""
    return model(**call, encoder_hidden_states=text, return_dict=False)[0].float()
