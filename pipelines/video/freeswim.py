"""FreeSwim: refines a video far above the size on which its model was trained.

"FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution
Video Generation" (Wu, Song, Tan, He, Liu, 2025, https://arxiv.org/abs/2511.14712): an enlarged
video is noised almost completely and denoised with attention to windows of the training size,
while a second path with full attention guides the text cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from typing import Any, get_args

import torch
from torch import Tensor

from diffaccel.attach.report import Report
from diffaccel.errors import check_kinds
from diffaccel.methods import SlidingWindowAttn
from diffaccel.pipelines.video.dual_path import Cache, DualPath
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
class FreeSwim:
    """The recipe; the defaults are the published ones.

    Args:
        steps: Steps of the whole schedule, of which the last `strength` run.
        strength: Share of the schedule that runs, in (0, 1].
        shift: Of the flow schedule. At 9 and strength 0.7, denoising starts from 95 % noise.
        guidance_scale: Of classifier-free guidance; 1 runs without the negative prompt.
        guide_every: Steps from one run of the full path to the next; those between reuse its
            cross-attention. 1 is the most faithful. None: windows alone, without a full path.
        guide_negative: Whether the negative prompt is guided by a full path too (at every step
            of `guide_every`), as in the variant without a cache.
        cache: Where cross-attention outputs wait, see `DualPath`; layers x tokens x width
            elements, 16 GB for Wan 1.3B at 1088x1920.
        method: The windows. `token_growth` sharpens the softmax of both paths.
        max_upscale: Largest factor per stage and axis, above 1: 2 passes through sizes between.
    """

    steps: int = 50
    strength: float = 0.7
    shift: float = 9.0
    guidance_scale: float = 5.0
    guide_every: int | None = 2
    guide_negative: bool = False
    cache: Cache = "keep"
    method: SlidingWindowAttn = SlidingWindowAttn(token_growth=2.0)
    max_upscale: float = 64.0

    def __post_init__(self) -> None:
        check_kinds(self)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got steps={self.steps!r}")
        if not 0.0 < self.strength <= 1.0:
            raise ValueError(
                f"strength must lie in (0, 1], got strength={self.strength}; it is the share of "
                "the schedule that runs"
            )
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got shift={self.shift}; 1 changes nothing")
        check_guidance_scale(self.guidance_scale)
        if self.cache not in get_args(Cache):
            raise ValueError(
                f"cache must be one of {', '.join(get_args(Cache))}, got cache={self.cache!r}"
            )
        if not isinstance(self.method, SlidingWindowAttn):
            raise ValueError(
                f"method must be a SlidingWindowAttn, got {type(self.method).__name__}; FreeSwim "
                "refines with windows of the model's native size"
            )
        if not 1.0 < self.max_upscale < inf:
            raise ValueError(
                f"max_upscale must exceed 1, got max_upscale={self.max_upscale}; 2 at most "
                "doubles both sides in each stage"
            )
        every = self.guide_every
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f"guide_every must be None or an integer of at least 1, got guide_every={every!r}"
            )

    @property
    def executed_steps(self) -> int:
        """Denoising steps that run."""
        return max(1, int(self.steps * self.strength))


@torch.no_grad()
def refine_latents(
    pipe: Any,
    latents: Tensor,
    conditions: Conditions,
    recipe: FreeSwim,
    *,
    generator: torch.Generator | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, dict[str, Report]]:
    """Noises and denoises the latents of an enlarged video.

    Args:
        pipe: A stock Wan pipeline: its transformers, scheduler and settings are used.
        latents: (B, C, F, h, w), normalised as the model expects them.
        conditions: Text and images.
        recipe: How.
        generator: Of the noise.
        on_step: Called after each step.

    Returns:
        The refined latents, fp32, and what the windows did in each transformer.
    """
    scheduler = shifted_scheduler(pipe, recipe.shift)
    scheduler.set_timesteps(recipe.steps, device=latents.device)
    skipped = recipe.steps - recipe.executed_steps
    scheduler.set_begin_index(skipped)
    sigma = scheduler.sigmas[skipped].to(latents.device)
    noise = torch.randn(
        latents.shape, generator=generator, device=generator.device if generator else "cpu"
    ).to(latents.device)
    x = (1 - sigma) * latents.float() + sigma * noise
    with ExitStack() as stack:
        paths = {
            name: stack.enter_context(DualPath(getattr(pipe, name), recipe.method, recipe.cache))
            for name in TRANSFORMERS
            if getattr(pipe, name, None) is not None
        }
        guided_by = None
        for index, timestep in enumerate(scheduler.timesteps[skipped:]):
            name = transformer_at(pipe, timestep)
            call = model_call(pipe, name, x, timestep, conditions)
            is_guide = recipe.guide_every is not None and (
                index % recipe.guide_every == 0 or guided_by != name
            )
            guided_by = name if is_guide else guided_by
            velocity = _velocity(paths[name], call, conditions, recipe, is_guide)
            x = scheduler.step(velocity.float(), timestep, x, return_dict=False)[0]
            on_step()
        reports = {name: path.report() for name, path in paths.items()}
    if conditions.first_frame is not None:
        x = torch.cat([conditions.first_frame.to(x.dtype), x[:, :, 1:]], 2)
    return x, reports


def _velocity(
    paths: DualPath,
    call: dict[str, Any],
    conditions: Conditions,
    recipe: FreeSwim,
    is_guide: bool,
) -> Tensor:
    """Predicts one velocity of the window path, with classifier-free guidance."""

    def predict(prompt: str, text: Tensor) -> Tensor:
        told = call | {"encoder_hidden_states": text}
        has_guide = prompt == "positive" or recipe.guide_negative
        if recipe.guide_every is None or not has_guide:
            return paths.alone(**told)
        return (paths.guided if is_guide else paths.reused)(prompt, **told)

    return guided_velocity(predict, conditions, recipe.guidance_scale)
