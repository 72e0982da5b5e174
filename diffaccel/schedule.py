"""Step position of a denoising run, read from the timesteps that the model is called with."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class StepClock:
    """Tells which denoising step a model call belongs to, and when a new run begins.

    Steps are distinct timesteps, never calls: guidance calls the model twice in one step, caches
    skip calls, and pipelines with two experts call each for a part of the steps (then each has
    its own clock and counts from its own first step). A run begins where the timestep jumps back
    to a noisier one or, where the pipeline is known, its scheduler got a new list of timesteps.

    Args:
        pipe: The pipeline that owns the scheduler, or None. Only a weak reference is kept.

    Attributes:
        step: Index of the current step, or None before the first call.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._timesteps: Tensor | None = None
        self._noise: float | None = None
        self.step: int | None = None

    def __reduce__(self) -> tuple:
        # A copied model belongs to another pipeline: its clock starts anew, without one.
        return StepClock, ()

    def reset(self) -> None:
        """Forgets the current run."""
        self._timesteps = self._noise = self.step = None

    def tick(self, timestep: Tensor | float | None) -> bool:
        """Moves to the step of a model call and returns whether it begins a new run.

        Reads the timestep from the device once.

        Args:
            timestep: As the model gets it: a number, (), (B,) or (B, N). Conditioned tokens
                (image to video) carry smaller values, so that the largest one counts.
        """
        if timestep is None:
            self.step = None
            return False
        noise = _largest(timestep)
        timesteps = self._scheduler_timesteps()
        new_run = self._noise is None or noise > self._noise or timesteps is not self._timesteps
        if new_run:
            self.step = 0
        elif noise < self._noise:
            self.step += 1
        self._noise, self._timesteps = noise, timesteps
        return new_run

    def _scheduler_timesteps(self) -> Tensor | None:
        """Returns the scheduler's list of timesteps; `set_timesteps` makes a new one per run."""
        pipe = None if self._pipe is None else self._pipe()
        return getattr(getattr(pipe, "scheduler", None), "timesteps", None)


def _largest(timestep: Tensor | float) -> float:
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
