"""Step position of a denoising run, read from the timesteps that the model is called with."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
"""Timesteps of pure noise in all families that a binding knows."""


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
        progress: Share of the schedule that lies behind the current step, from 0 (pure noise) to
            below 1, or None before the first call. A run that begins in the middle of the
            schedule (image to image) begins with its share. Without a pipeline, the share of
            the training timesteps.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._timesteps: Tensor | None = None
        self._schedule: list[float] = []
        self._unit = 1.0
        self._noise: float | None = None
        self.step: int | None = None
        self.progress: float | None = None

    def __reduce__(self) -> tuple:
        # A copied model belongs to another pipeline: its clock starts anew, without one.
        return StepClock, ()

    def reset(self) -> None:
        """Forgets the current run."""
        self._timesteps = self._noise = self.step = self.progress = None

    def tick(self, timestep: Tensor | float | None) -> bool:
        """Moves to the step of a model call and returns whether it begins a new run.

        Reads the timestep from the device once.

        Args:
            timestep: As the model gets it: a number, (), (B,) or (B, N). Conditioned tokens
                (image to video) carry smaller values, so that the largest one counts.
        """
        if timestep is None:
            self.step = self.progress = None
            return False
        noise = _largest(timestep)
        timesteps = self._scheduler_timesteps()
        before, step = self._noise, self.step
        new_run = before is None or noise > before or timesteps is not self._timesteps
        if before is None or step is None or new_run:
            self.step = 0
            self._read_schedule(noise, timesteps)
        elif noise < before:
            self.step = step + 1
        self._noise, self._timesteps = noise, timesteps
        self.progress = self._progress_at(noise * self._unit)
        return new_run

    def _read_schedule(self, noise: float, timesteps: Tensor | None) -> None:
        """Reads the scheduler's list, and in which unit the model gets its timesteps."""
        self._schedule = [] if timesteps is None else [float(t) for t in timesteps]
        # FLUX and Qwen pipelines divide timesteps by 1000, others pass them as they are.
        is_divided = noise <= 1 < max(self._schedule, default=TRAIN_TIMESTEPS)
        self._unit = float(TRAIN_TIMESTEPS) if is_divided else 1.0

    def _progress_at(self, timestep: float) -> float:
        if not self._schedule:
            return min(max(1.0 - timestep / TRAIN_TIMESTEPS, 0.0), 1.0)
        distances = [abs(known - timestep) for known in self._schedule]
        return distances.index(min(distances)) / len(distances)

    def _scheduler_timesteps(self) -> Tensor | None:
        """Returns the scheduler's list of timesteps; `set_timesteps` makes a new one per run."""
        pipe = None if self._pipe is None else self._pipe()
        return getattr(getattr(pipe, "scheduler", None), "timesteps", None)


def _largest(timestep: Tensor | float) -> float:
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
