"""Starts a stock pipeline part of the way, from a picture or clip instead of from noise.

SDEdit (Meng et al., 2021, https://arxiv.org/abs/2108.01073) for every pipeline that makes its
latents in `prepare_latents` and reads its schedule from a scheduler: the scheduler leaves out the
steps before the start, and the latents are those given, noised as the first step expects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from diffaccel.errors import InputError
from diffaccel.pipelines.redraw.latents import LatentCodec

_Scheduler: Any = object
"""Stands for the scheduler behind the mixin."""


class LateStart(_Scheduler):
    """Turns a scheduler into one whose runs begin part of the way. A mixin.

    Attributes:
        strength: Share of the schedule that runs, in (0, 1].
        on_step: Called after each step.
    """

    timesteps: Any
    sigmas: Any
    strength: float = 1.0
    on_step: Callable[[], None] = staticmethod(lambda: None)
    _clean: Tensor | None = None
    _latents: Tensor | None = None
    _is_timed: bool = False

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Sets the schedule of the scheduler behind, and leaves its beginning out."""
        super().set_timesteps(*args, **kwargs)
        order = getattr(self, "order", 1)
        steps = len(self.timesteps) // order
        skipped = int(max(steps - steps * self.strength, 0)) * order
        self.timesteps = self.timesteps[skipped:]
        if getattr(self, "sigmas", None) is not None and len(self.sigmas) > len(self.timesteps):
            self.sigmas = self.sigmas[skipped:]
        self._is_timed = True
        self._begin()

    def adopt(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Takes what a pipeline is to start from, and returns its latents.

        Their values follow when the schedule is known, which is before the first step.

        Args:
            clean: Arranged as the pipeline holds latents.
            noise: What the pipeline would have started from.
        """
        self._clean, self._latents = clean.to(noise).expand_as(noise), noise.clone()
        self._begin()
        return self._latents

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes a step, and says so."""
        output = super().step(*args, **kwargs)
        self.on_step()
        return output

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scales what a model sees, where the scheduler behind does.

        Bria asks it of every class but the one it knows.
        """
        behind = getattr(super(), "scale_model_input", None)
        return sample if behind is None else behind(sample, *args, **kwargs)

    def _begin(self) -> None:
        if self._clean is None or self._latents is None or not self._is_timed:
            return
        clean, noise = self._clean, self._latents.clone()
        scale = getattr(self, "init_noise_sigma", 1.0)
        noise = noise / scale if scale != 1 else noise
        first = self.timesteps[:1].expand(len(clean))
        if hasattr(self, "scale_noise"):
            noised = self.scale_noise(clean, first, noise)
        else:
            noised = self.add_noise(clean, noise, first)
        self._latents.copy_(noised)
        self._clean = None


@cache
def _late_class(kind: type[SchedulerMixin]) -> type[LateStart]:
    """The one subclass of a scheduler class that starts late.

    Its methods keep their signatures, by which pipelines decide what they pass.
    """
    behind: Any = kind

    @wraps(behind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        LateStart.set_timesteps(self, *args, **kwargs)

    @wraps(behind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LateStart.step(self, *args, **kwargs)

    members = {"set_timesteps": set_timesteps, "step": step}
    return type(f"Late{kind.__name__}", (LateStart, kind), members)


def starting_late(scheduler: Any, strength: float, on_step: Callable[[], None]) -> Any:
    """Makes a scheduler start late; its configuration and attributes stay.

    Raises:
        InputError: It cannot noise a picture.
    """
    _check_noising(scheduler)
    kind: Any = type(scheduler)
    late = _late_class(kind).from_config(scheduler.config)
    late.__dict__.update(scheduler.__dict__)
    late.strength, late.on_step = strength, on_step
    return late


@contextmanager
def started_from(
    pipe: Any, scheduler: LateStart, clean: Tensor, codec: LatentCodec
) -> Iterator[None]:
    """Makes runs of a pipeline start from given latents, for a `with` block.

    Args:
        pipe: A stock pipeline.
        scheduler: What it runs with.
        clean: Normalised latents (B, C, h, w) or (B, C, F, h, w).
        codec: How the pipeline holds them.

    Raises:
        InputError: The pipeline makes latents of another shape.
    """
    own, prepare = pipe.scheduler, pipe.prepare_latents
    model = getattr(pipe, "transformer", None) or pipe.unet
    packed = codec.pack(clean, model)

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        noise, *others = made if isinstance(made, tuple) else (made,)
        latents = scheduler.adopt(_arranged_like(noise, packed, pipe), noise)
        return (latents, *others) if isinstance(made, tuple) else latents

    pipe.scheduler, pipe.prepare_latents = scheduler, prepare_latents
    try:
        yield
    finally:
        pipe.scheduler = own
        del pipe.prepare_latents


def _arranged_like(noise: Tensor, packed: Tensor, pipe: Any) -> Tensor:
    """Adds the axis of one frame where a pipeline of pictures has it."""
    given = packed
    for axis in range(1, noise.ndim) if noise.ndim == packed.ndim + 1 else ():
        if packed.unsqueeze(axis).shape[1:] == noise.shape[1:]:
            given = packed.unsqueeze(axis)
    if given.shape[1:] != noise.shape[1:]:
        raise InputError(
            f"{type(pipe).__name__} holds latents of shape {tuple(noise.shape[1:])}, those of "
            f"the picture are {tuple(given.shape[1:])}; choose another size"
        )
    return given


def check_startable(pipe: Any) -> None:
    """Refuses before any work a pipeline that cannot start from a picture.

    Raises:
        InputError: It makes its latents elsewhere, or its scheduler cannot noise a picture.
    """
    name = type(pipe).__name__
    if not hasattr(pipe, "prepare_latents"):
        raise InputError(
            f"to redraw a picture a pipeline must make its latents in prepare_latents, {name} "
            "does not; generate at native size"
        )
    _check_noising(pipe.scheduler)


def _check_noising(scheduler: Any) -> None:
    if not (hasattr(scheduler, "scale_noise") or hasattr(scheduler, "add_noise")):
        raise InputError(
            "to redraw a picture the scheduler must be able to noise it, and "
            f"{type(scheduler).__name__} is not; set pipe.scheduler to a flow or DDIM scheduler"
        )


@torch.no_grad()
def pixels_of(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges (B, 3, H, W) or (B, 3, F, H, W) in [0, 1] to a size (width, height) in [-1, 1]."""
    frames = images if images.ndim == 4 else images.transpose(1, 2).flatten(0, 1)
    large = torch.nn.functional.interpolate(
        frames, size[::-1], mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    if images.ndim == 5:
        large = large.unflatten(0, (len(images), -1)).transpose(1, 2)
    return large * 2 - 1
