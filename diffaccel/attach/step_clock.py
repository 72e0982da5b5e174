"""Where a denoising run stands: its step, read from the scheduler that drives it.

Timesteps that reach the model do not tell: they are rounded (bf16 has 256 numbers from 0.5 to 1,
where FLUX at 4096 pixels has all of its steps), repeat (schedulers of second order), rise
(inversion) or start late (image to image). The scheduler's own list and index do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
"""Timesteps of pure noise in all families that a binding knows."""


class StepClock:
    """Tells which denoising step a model call belongs to, and when a new run begins.

    Steps are those of the scheduler, never calls: guidance calls the model twice in one step,
    caches skip calls, and pipelines with two experts call each for a part of the steps (then each
    has its own clock and counts from its own first step). A run begins where the scheduler got a
    new list of timesteps or went back in it. Where no pipeline is known, steps are distinct
    timesteps, and a run begins where they turn back.

    Args:
        pipe: The pipeline that owns the scheduler where a call does not say which one runs, or
            None. Only a weak reference is kept.

    Attributes:
        step: Index of the current step, or None before the first call.
        planned: Steps that the run will have, None where no scheduler tells.
        total: Steps of the whole schedule, of which a run may do a part; None likewise.
        progress: Share of the schedule that lies behind the current step, from 0 (pure noise) to
            below 1, or None before the first call. A run that begins in the middle of the
            schedule (image to image) begins with its share. Without a pipeline, the share of
            the training timesteps.
        ends: Share of the steps of the whole schedule that lies behind when the current one is
            done, above 0 to 1; None where no scheduler tells.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe: Callable[[], Any] = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._seen: dict[str, Tensor] = {}
        self._scheduler: str | None = None
        self.reset()

    def __reduce__(self) -> tuple:
        # A copied model belongs to another pipeline: its clock starts anew, without one.
        return StepClock, ()

    def reset(self) -> None:
        """Forgets the current run."""
        self._run: _Schedule | _Noise | None = None
        self.step: int | None = None
        self.planned: int | None = None
        self.total: int | None = None
        self.progress: float | None = None
        self.ends: float | None = None

    def tick(self, timestep: Tensor | float | None, pipe: Any = None) -> bool:
        """Moves to the step of a model call and returns whether it begins a new run.

        Reads the timestep from the device only where the scheduler has no index yet.

        Args:
            timestep: As the model gets it: a number, (), (B,) or (B, N). Conditioned tokens
                (image to video) carry smaller values, so that the largest one counts.
            pipe: The pipeline that runs, where it is known.
        """
        if timestep is None:
            self.step = self.progress = self.ends = None
            return False
        scheduler = self._running_scheduler(self._pipe() if pipe is None else pipe)
        run = self._run
        if scheduler is None:
            if not isinstance(run, _Noise) or not run.goes_on(timestep):
                self._run = _Noise(timestep)
        elif not isinstance(run, _Schedule) or not run.goes_on(scheduler, timestep):
            self._run = _Schedule(scheduler, timestep, getattr(pipe, "_num_timesteps", None))
        current: Any = self._run
        self.step, self.planned, self.total = current.step, current.planned, current.total
        self.progress, self.ends = current.progress, current.ends
        return current is not run

    def _running_scheduler(self, pipe: Any) -> Any:
        """Returns the scheduler whose list changed last: inversion has one of its own."""
        found = {
            name: part
            for name, part in (() if pipe is None else vars(pipe).items())
            if name.endswith("scheduler") and isinstance(getattr(part, "timesteps", None), Tensor)
        }
        if len(found) > 1:
            found = {
                name: part
                for name, part in found.items()
                if getattr(part, "num_inference_steps", 1) is not None
            } or found
        changed = [n for n, part in found.items() if self._seen.get(n) is not part.timesteps]
        self._seen = {name: part.timesteps for name, part in found.items()}
        if changed or self._scheduler not in found:
            names = changed or list(found)
            self._scheduler = "scheduler" if "scheduler" in names else next(iter(names), None)
        return None if self._scheduler is None else found[self._scheduler]


class _Schedule:
    """One run through the timesteps of a scheduler.

    Args:
        scheduler: Its timesteps are set.
        timestep: Of the first model call.
        count: Entries of the list that will run, where the pipeline says so.
    """

    def __init__(self, scheduler: Any, timestep: Tensor | float, count: int | None) -> None:
        self.timesteps: Tensor = scheduler.timesteps
        self._values: list[float] = self.timesteps.tolist()
        self._steps = _steps_of(scheduler, self._values)
        self.total = self._steps[-1] + 1
        self._is_rising: bool | None = None
        # FLUX and Qwen pipelines divide timesteps by 1000, others pass them as they are.
        noise = _largest(timestep)
        # A list from 1000 to 1 holds both readings of 1: a run begins with its first entry.
        is_first = noise != self._values[0] == 1000 * noise
        is_plain = noise in self._values and not is_first
        self._unit = 1 if is_plain or not noise <= 1 < max(self._values) else 1000
        index = _told_index(scheduler, len(self._values))
        self._first = self._index = self._found(timestep, 0) if index is None else index
        self._calls = getattr(scheduler, "counter", None)  # PNDM counts from where a run begins
        left = len(self._values) - self._first
        count = count if isinstance(count, int) and 0 < count <= left else left
        self.planned = self._steps[self._first + count - 1] - self._steps[self._first] + 1

    @property
    def step(self) -> int:
        """Index of the current step within the run."""
        return abs(self._steps[self._index] - self._steps[self._first])

    @property
    def progress(self) -> float:
        """Share of the list that lies behind."""
        return self._index / len(self._values)

    @property
    def ends(self) -> float:
        """Share of the steps that lies behind when the current one is done."""
        return (self._steps[self._index] + 1) / self.total

    def goes_on(self, scheduler: Any, timestep: Tensor | float) -> bool:
        """Moves to the place of a model call, unless it begins another run."""
        if scheduler.timesteps is not self.timesteps:
            return False
        index = _told_index(scheduler, len(self._values))
        if index is None and self._calls is not None:
            index = self._first + scheduler.counter - self._calls
        if index is not None:
            if not self._index <= index < len(self._values):
                return False
        else:
            index = self._found(timestep, self._index)
            if index != self._index:
                is_rising = index > self._index
                if self._is_rising not in (None, is_rising) or index < self._index - 1:
                    return False
                self._is_rising = is_rising
        self._index = index
        return True

    def _found(self, timestep: Tensor | float, place: int) -> int:
        """Returns where a model's timestep stands in the list, as near to a place as possible."""
        noise = _largest(timestep)
        values = [value / self._unit for value in self._values]
        rounded = values
        if isinstance(timestep, Tensor) and timestep.is_floating_point():
            rounded = torch.tensor(values).to(timestep.dtype).tolist()
        for exact in (rounded, values):
            places = [index for index, value in enumerate(exact) if value == noise]
            if places:
                return min(places, key=lambda index: (index < place, abs(index - place)))
        nearest = min(range(len(values)), key=lambda index: abs(values[index] - noise))
        # Models whose time runs the other way meet no entry: they stay where they are.
        is_near = abs(values[nearest] - noise) <= 0.02 * abs(values[nearest])
        return nearest if is_near else place


class _Noise:
    """One run of distinct timesteps, where nothing but these is known."""

    planned: int | None = None
    total: int | None = None
    ends: float | None = None

    def __init__(self, timestep: Tensor | float) -> None:
        self._noise = _largest(timestep)
        self._unit = TRAIN_TIMESTEPS if self._noise > 1 else 1
        self._is_rising: bool | None = None
        self.step = 0

    @property
    def progress(self) -> float:
        """Share of the training timesteps that lies behind."""
        return min(max(1.0 - self._noise / self._unit, 0.0), 1.0)

    def goes_on(self, timestep: Tensor | float) -> bool:
        """Moves to the step of a model call, unless it begins another run."""
        noise = _largest(timestep)
        if noise != self._noise:
            is_rising = noise > self._noise
            if self._is_rising not in (None, is_rising):
                return False
            self._noise, self._is_rising = noise, is_rising
            self.step += 1
        return True


def _steps_of(scheduler: Any, values: list[float]) -> list[int]:
    """Returns the step to which each entry of a list of timesteps belongs.

    Schedulers of second order have two entries for a step, the Runge-Kutta steps of PNDM four;
    where it repeats an entry to correct a step, each value counts once.
    """
    if hasattr(scheduler, "step_index"):
        return [index // scheduler.order for index in range(len(values))]
    prepared = getattr(scheduler, "prk_timesteps", None)
    four = 0 if prepared is None else len(prepared)
    ranks: dict[float, int] = {}
    rest = [four // 4 + ranks.setdefault(value, len(ranks)) for value in values[four:]]
    return [index // 4 for index in range(four)] + rest


def _told_index(scheduler: Any, length: int) -> int | None:
    """Returns where a scheduler says that it stands in its list, None where it does not."""
    index = getattr(scheduler, "step_index", None)
    index = getattr(scheduler, "begin_index", None) if index is None else index
    # After the last step it stands behind the list: what is called then is no part of a run.
    return None if index is None or not 0 <= index < length else int(index)


def _largest(timestep: Tensor | float) -> float:
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
