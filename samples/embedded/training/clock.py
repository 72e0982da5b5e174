"""Times a training run by the wall clock, across interruptions."""

import math
import time

LONGEST_STEP_S = 60.0


class Clock:
    """Counts the minutes that a run has trained and derives the learning rate from them.

    Time passes at `tick`, once per step. A step counts for a minute at most, so that a paused
    process or a sleeping laptop does not use up the schedule.

    Args:
        minutes: Length of the whole run.
        spent_s: Seconds already trained before an interruption.
        warm_up: Share of the run over which the rate rises to its peak.
        decay: Share of the run over which it falls to zero again, along a cosine.
    """

    def __init__(
        self, minutes: float, spent_s: float = 0.0, warm_up: float = 0.02, decay: float = 0.6
    ) -> None:
        self.total_s = minutes * 60
        self.spent_s = spent_s
        self.last = time.monotonic()
        self.warm_up = warm_up
        self.decay = decay

    def tick(self) -> None:
        """Adds the time since the last tick."""
        now = time.monotonic()
        self.spent_s += min(now - self.last, LONGEST_STEP_S)
        self.last = now

    @property
    def progress(self) -> float:
        """Share of the run that has passed, 0 to 1."""
        return min(1.0, self.spent_s / self.total_s)

    def rate(self) -> float:
        """Returns the present factor on the peak learning rate, 0 to 1."""
        progress = self.progress
        rising = min(1.0, (progress + 1e-3) / self.warm_up) if self.warm_up else 1.0
        falling = (1.0 - progress) / self.decay
        return min(rising, 0.5 - 0.5 * math.cos(math.pi * min(1.0, falling)))
