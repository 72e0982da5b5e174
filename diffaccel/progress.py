"""Progress of a long job: one bar a phase, with the time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType

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
    def phase(self, name: str, total: int) -> Iterator["RunningPhase"]:
        """Times a phase of `total` parts and draws its bar."""
        task = self.bars.add_task(name, total=total) if self.bars else None
        started = perf_counter()
        yield RunningPhase(self.bars, task)
        self.seconds[name] = round(perf_counter() - started, 3)
        if self.bars:
            self.bars.update(task, completed=total)


@dataclass(frozen=True, slots=True)
class RunningPhase:
    """A phase that `Timing` has opened."""

    bars: Progress | None
    task: int | None

    def advance(self) -> None:
        """Reports one finished part."""
        if self.bars:
            self.bars.advance(self.task)


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
