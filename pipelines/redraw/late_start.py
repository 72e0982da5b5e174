"""Starts a stock pipeline part of the way, from a picture or clip instead of from noise.

SDEdit (Meng et al., 2021, https://arxiv.org/abs/2108.01073) for every pipeline that makes its
latents in `prepare_latents` and reads its schedule from a scheduler: the scheduler leaves out the
steps before the start, and the latents are those given, noised as the first step expects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from functools import cache, wraps
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from diffaccel.bindings.exchange import exchanged
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
    _adopted: tuple[tuple[Tensor, Tensor], ...] = ()
    _is_timed: bool = False
    _done: int | None = None

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

    def adopt(self, clean: Tensor, latents: Tensor) -> None:
        """Takes what a pipeline is to start from.

        Values follow when the schedule is known, which is before the first step.

        Args:
            clean: Arranged as the pipeline holds latents.
            latents: Noise that the pipeline would have started from, replaced in place.
        """
        self._adopted += ((clean.to(latents).expand_as(latents), latents),)
        self._begin()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes a step, and says so; the steps of Cosmos go to one place twice."""
        output = super().step(*args, **kwargs)
        done = getattr(self, "_step_index", None)
        if done is None or done != self._done:
            self.on_step()
        self._done = done
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies the schedule: LTX-2 has one for its sound, which starts and counts with this."""
        twin = copy(self)
        memo[id(self)] = twin
        own = {"on_step": LateStart.on_step, "_adopted": ()}
        rest = {name: value for name, value in vars(self).items() if name not in own}
        twin.__dict__ = deepcopy(rest, memo) | own
        return twin

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scales what a model sees, where the scheduler behind does.

        Bria asks it of every class but the one it knows.
        """
        behind = getattr(super(), "scale_model_input", None)
        return sample if behind is None else behind(sample, *args, **kwargs)

    def _begin(self) -> None:
        if not self._is_timed:
            return
        self._done = None
        for clean, latents in self._adopted:
            scale = getattr(self, "init_noise_sigma", 1.0)
            noise = latents / scale if scale != 1 else latents.clone()
            first = self.timesteps[:1].expand(len(clean))
            if hasattr(self, "scale_noise"):
                noised = self.scale_noise(clean, first, noise)
            else:
                noised = self.add_noise(clean, noise, first)
            latents.copy_(noised)
        self._adopted = ()


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
    late._is_timed = False  # some are given a schedule as they are made
    return late


@contextmanager
def started_from(
    pipe: Any, scheduler: LateStart, clean: Tensor, codec: LatentCodec, sound: Tensor | None = None
) -> Iterator[None]:
    """Makes runs of a pipeline start from given latents, for a `with` block.

    Args:
        pipe: A stock pipeline.
        scheduler: What it runs with.
        clean: Normalised latents (B, C, h, w) or (B, C, F, h, w); frames that a given picture
            decides are left out at the beginning.
        codec: How the pipeline holds them.
        sound: Latents (B, C, L, M) of the sound of LTX-2, as its autoencoder makes them.

    Raises:
        InputError: The pipeline makes latents of another shape.
    """
    own, prepare = pipe.scheduler, pipe.prepare_latents
    model = getattr(pipe, "transformer", None) or pipe.unet
    packed = codec.pack(clean, model)

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        noise, *others = made if isinstance(made, tuple) else (made,)
        latents = noise.to(_prepared_dtype(pipe, noise), copy=True)
        part = codec.part_like(latents, packed)
        scheduler.adopt(_arranged_like(part, packed, pipe), part)
        return (latents, *others) if isinstance(made, tuple) else latents

    changed = {"prepare_latents": prepare_latents}
    if sound is not None:
        prepare_sound = pipe.prepare_audio_latents

        def prepare_audio_latents(*args: Any, latents: Any = None, **kwargs: Any) -> Tensor:
            noise = prepare_sound(*args, **kwargs)
            scheduler.adopt(prepare_sound(*args, latents=sound, **kwargs), noise)
            return noise

        changed["prepare_audio_latents"] = prepare_audio_latents
    pipe.scheduler = scheduler
    try:
        with ExitStack() as stack:
            for name, value in changed.items():
                stack.enter_context(exchanged(pipe, name, value))
            yield
    finally:
        pipe.scheduler = own


def _prepared_dtype(pipe: Any, noise: Tensor) -> torch.dtype:
    """The dtype in which latents stay the tensor that was made: AnyFlow rounds them at once."""
    return pipe.transformer.dtype if type(pipe).__name__ == "AnyFlowPipeline" else noise.dtype


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
