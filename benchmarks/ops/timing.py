"""Measures calls: interleaved, so that whatever drifts drifts for all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

LEAST_REPETITIONS = 3
_LEAD_CYCLES = 2_000_000  # about 1 ms


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of the time of one call.

    Args:
        p20_ms: One call in five is faster.
        p50_ms: The median.
        p80_ms: One call in five is slower.
        repetitions: How many calls were timed.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repetitions: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Takes the percentiles, with linear interpolation between samples in milliseconds."""
        p20, p50, p80 = map(float, np.percentile(samples, (20, 50, 80)))
        return cls(p20, p50, p80, len(samples))


class Deadline:
    """A point in time after which no more work is begun.

    Args:
        seconds: From now on; None for never.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else perf_counter() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self._end is not None and perf_counter() >= self._end


class Stopwatch:
    """Times one call in milliseconds; a new one for each call."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._start: Any
        self._end: Any
        if self._is_cuda:
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(self, call: Callable[[], object]) -> None:
        """Makes the call; on CUDA it may still be under way on return."""
        if not self._is_cuda:
            self._start = perf_counter()
            call()
            self._end = perf_counter()
            return
        # The device is busy while the host enqueues the call, or launching would count too.
        torch.cuda._sleep(_LEAD_CYCLES)
        self._start.record()
        call()
        self._end.record()

    def read(self) -> float:
        """Waits for the call to end and returns its milliseconds."""
        if not self._is_cuda:
            return (self._end - self._start) * 1e3
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


def interleave(
    contestants: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    *,
    row_seconds: float,
    repetitions: int,
    deadline: Deadline,
) -> dict[str, list[float]]:
    """Times several calls in turns, round by round; each must have been warmed up.

    Each contestant gets as many repetitions as fit its budget, at least three, spread evenly over
    the rounds, so that slow and fast ones see the same machine.

    Args:
        contestants: Name to calls that do the same on different inputs; they take turns.
        device: Where they run.
        row_seconds: Time budget of one contestant.
        repetitions: At most so many for each.
        deadline: When to stop, whatever is still missing.

    Returns:
        Milliseconds of each call; empty where the deadline came first.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}

    def play(names: Sequence[str], turn: int) -> None:
        watches = {}
        for name in names:
            if deadline.passed:
                break
            calls = contestants[name]
            watches[name] = Stopwatch(device)
            watches[name].run(calls[turn % len(calls)])
        for name, watch in watches.items():
            samples[name].append(watch.read())

    play(list(contestants), 0)
    wanted = {
        name: planned_repetitions(found[0], row_seconds, repetitions)
        for name, found in samples.items()
        if found
    }
    rounds = max(wanted.values(), default=1) - 1
    for turn in range(rounds):
        play(
            [name for name, count in wanted.items() if takes_part(turn, count - 1, rounds)],
            turn + 1,
        )
    return samples


def planned_repetitions(first_ms: float, row_seconds: float, most: int) -> int:
    """How many calls of `first_ms` fit a budget: at least three, at most `most`."""
    fitting = int(row_seconds * 1e3 / max(first_ms, 1e-6))
    return min(max(fitting, LEAST_REPETITIONS), max(most, 1))


def takes_part(turn: int, count: int, rounds: int) -> bool:
    """Whether one of `count` calls, spread evenly over `rounds`, falls on this turn."""
    return (turn + 1) * count // rounds > turn * count // rounds


def time_alone(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Times one call by itself, in milliseconds, after a first one that does not count."""
    call()
    found = interleave(
        {"call": [call]}, device, row_seconds=seconds, repetitions=100, deadline=Deadline()
    )
    return found["call"]
