"""Progress of a long job: one bar a phase, with the time left."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass
class Timing:
    """How long the phases of a job took, in the order they ran.

    Attributes:
        seconds: Phase name to wall-clock seconds.
        bars: Where the phases are drawn; nothing is drawn by default.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bars: Progress | None = None

    @contextmanager
    def phases(self, totals: dict[str, int]) -> Iterator[Callable[[str], None]]:
        """Times phases that follow one another, and draws a bar for each.

        Args:
            totals: Phase name to its number of parts, in the order they run.

        Yields:
            A function that is called with a phase's name whenever one of its parts is done.
        """
        bars = self.bars
        tasks = {name: bars.add_task(name, total=n) for name, n in totals.items()} if bars else {}
        ended = {}
        started = perf_counter()

        def advance(name: str) -> None:
            ended[name] = perf_counter()
            if bars:
                bars.advance(tasks[name])

        yield advance
        ended[list(totals)[-1]] = perf_counter()
        for name in totals:
            end = ended.get(name, started)
            self.seconds[name] = round(end - started, 3)
            started = end
            if bars:
                bars.update(tasks[name], completed=totals[name])


def step_callback(advance: Callable[[], None]) -> Callable[..., dict[str, object]]:
    """Wraps a function in the signature that diffusers pipelines call after each step."""

    def on_step_end(
        _pipe: object, _step: int, _timestep: int, tensors: dict[str, object]
    ) -> dict[str, object]:
        advance()
        return tensors

    return on_step_end


def counting_steps(pipe: Any, advance: Callable[[], None]) -> dict[str, Any]:
    """Returns the argument by which a pipeline says that a step is done; some have none."""
    name = "callback_on_step_end"
    known = name in inspect.signature(type(pipe).__call__).parameters
    return {name: step_callback(advance)} if known else {}


class ProgressBars:
    """Draws the phases of a job on the terminal's error stream."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )

    def __enter__(self) -> Timing:
        self.bars.start()
        return Timing(bars=self.bars)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()
