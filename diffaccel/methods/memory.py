"""What a method remembers of a layer from one call to the next, within one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any


class LayerMemory:
    """What a method remembers of one layer; whoever attaches the method drops it with the run.

    Calls share what is remembered only where they are of one kind (layout, shape, dtype, device)
    and have the same place among the calls of that kind within a step. So passes of guidance
    that call the model one after the other have memories of their own, as long as they come in
    the same order in each step; samples of one batch have theirs by their place in it. A copy
    remembers nothing.

    Attributes:
        orders: Kind of call -> order of tokens that was found best for it.
        reused_calls: Calls that took the block lists of an earlier step.
    """

    def __init__(self) -> None:
        self.orders: dict[Hashable, str] = {}
        self.reused_calls = 0
        self._step: int | None = None
        self._calls: Counter[Hashable] = Counter()
        self._remembered: dict[Hashable, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return LayerMemory, ()

    def of_call(self, step: int | None, kind: Hashable) -> dict[str, Any]:
        """Returns what is remembered for a call, to be read and changed; once for each call.

        What is remembered for the first such call of a step is under "first" for the others.

        Args:
            step: Index of the denoising step.
            kind: What calls must have in common to share anything.
        """
        if step != self._step:
            self._step = step
            self._calls.clear()
        place = self._calls[kind]
        self._calls[kind] += 1
        remembered = self._remembered.setdefault((kind, place), {})
        if place:
            remembered["first"] = self._remembered[kind, 0]
        return remembered

    def forget(self) -> None:
        """Lets go of all tensors; what a report tells stays."""
        self._remembered.clear()
