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
from diffusers import DiffusionPipeline
from torch import Tensor

from diffaccel.errors import InputError
from diffaccel.pipelines.video.generate import GeneratedVideo, check_video_size
from diffaccel.pipelines.video.wan import (
    Conditions,
    decode_video,
    encode_conditions,
    guided_velocity,
    model_call,
    shifted_scheduler,
    tiled_vae,
    transformer_at,
)
from diffaccel.progress import Timing


@dataclass(frozen=True, slots=True)
class TimeWindows:
    """How a long video is cut.

    Args:
        length: Latent frames per window; 21 (81 frames) for Wan 2.1.
        overlap: Latent frames that neighbours share, less than `length`.
        moves: Whether the cuts move by half a stride at every second step.
    """

    length: int = 21
    overlap: int = 8
    moves: bool = True

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= self.overlap < self.length:
            raise ValueError(
                "length must be at least 1 and overlap in 0 to length - 1, got "
                f"length={self.length}, overlap={self.overlap}"
            )

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
    pipe: DiffusionPipeline,
    noise: Tensor,
    conditions: Conditions,
    windows: TimeWindows,
    *,
    steps: int = 50,
    shift: float | None = None,
    guidance_scale: float = 5.0,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoises latents of any length.

    Args:
        pipe: A stock Wan text-to-video pipeline.
        noise: (B, C, F, h, w).
        conditions: The text.
        windows: How the latents are cut.
        steps: Denoising steps.
        shift: Of the flow schedule, the pipeline's own by default.
        guidance_scale: Of classifier-free guidance; 1 runs without.
        on_step: Called after each step.
    """
    config = pipe.scheduler.config
    own = config.get("flow_shift", config.get("shift", 1.0))
    scheduler = shifted_scheduler(pipe, own if shift is None else shift)
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise.float()
    for step, timestep in enumerate(scheduler.timesteps):
        name = transformer_at(pipe, timestep)
        model = getattr(pipe, name)
        velocity = torch.zeros_like(x)
        for window, weights in windows.weights(x.shape[2], step):
            part = model_call(pipe, name, x[:, :, window], timestep, conditions)
            predicted = guided_velocity(partial(_predict, model, part), conditions, guidance_scale)
            velocity[:, :, window] += predicted * weights.to(x.device)[:, None, None]
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        on_step()
    return x


def generate_long_video(
    pipe: DiffusionPipeline,
    prompt: str | list[str],
    width: int,
    height: int,
    frames: int,
    *,
    negative_prompt: str | None = None,
    windows: TimeWindows | None = None,
    steps: int = 50,
    guidance_scale: float = 5.0,
    seed: int = 0,
    timing: Timing | None = None,
    **prompt_embeds: Tensor,
) -> GeneratedVideo:
    """Generates one long video per prompt at a size that the model knows.

    Args:
        pipe: A stock Wan text-to-video pipeline.
        prompt: What happens, all the time; several make a batch.
        width: In pixels.
        height: In pixels.
        frames: 1 more than a multiple of 4, as many as memory holds.
        negative_prompt: What must not be seen.
        windows: How time is cut.
        steps: Denoising steps.
        guidance_scale: Of classifier-free guidance.
        seed: Of the noise.
        timing: Where phases are timed and drawn.
        prompt_embeds: `prompt_embeds` and `negative_prompt_embeds` in place of the prompts.

    Raises:
        InputError: A size breaks the rule of `check_video_size`, or the model starts from an
            image.
    """
    check_video_size(pipe, width, height, frames)
    channels = pipe.transformer.config.in_channels
    if channels != pipe.transformer.config.out_channels:
        raise InputError(
            "windows along time need a text-to-video model, since a given first frame belongs to "
            f"one window alone; got one of {channels} input channels"
        )
    timing, windows = timing or Timing(), windows or TimeWindows()
    told: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
    told = dict(prompt_embeds) or told
    label = f"{width}x{height}x{frames}"
    with timing.phases({f"denoise {label}": steps, f"decode {label}": 1}) as advance:
        sides = (side // pipe.vae_scale_factor_spatial for side in (height, width))
        latents = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        batch = _batch(told)
        noise = torch.randn(
            batch, channels, latents, *sides, generator=torch.Generator().manual_seed(seed)
        ).to(pipe._execution_device)
        conditions = encode_conditions(pipe, told, guidance_scale, None, noise, frames)
        x = denoise_windows(
            pipe, noise, conditions, windows, steps=steps, guidance_scale=guidance_scale,
            on_step=lambda: advance(f"denoise {label}"),
        )  # fmt: skip
        with tiled_vae(pipe.vae), torch.no_grad():
            video = decode_video(pipe, x)
        pipe.maybe_free_model_hooks()
        advance(f"decode {label}")
    return GeneratedVideo(video, (width, height), timing.seconds)


def _predict(model: torch.nn.Module, call: dict[str, Any], _prompt: str, text: Tensor) -> Tensor:
    """Predicts the velocity of a window, fp32."""
    return model(**call, encoder_hidden_states=text, return_dict=False)[0].float()


def _batch(told: dict[str, Any]) -> int:
    prompt = told.get("prompt_embeds", told.get("prompt"))
    return 1 if isinstance(prompt, str) else len(prompt)
