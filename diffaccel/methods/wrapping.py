"""Methods around another one, which decides about everything that they do not change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method, Visited
from diffaccel.methods.inputs import Position

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, repr=False)
class WrappingMethod(Method):
    """A method that holds another, and follows that one's schedule and cost.

    A subclass gives the field a default, and implements `compute` by the inner method's `run`,
    which asks for the reasons to run dense.
    """

    method: Method

    @property
    def compares_heads(self) -> bool:
        return self.method.compares_heads

    def expected_density(self, layout: TokenLayout) -> float | None:
        return self.method.expected_density(layout)

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        return self.method.expected_cost(layout, device)

    def visited(
        self, layout: TokenLayout, query: Tensor, layer: int | None = None
    ) -> Visited | None:
        return self.method.visited(layout, query, layer)

    def scheduled(self, position: Position) -> Self:
        method = self.method.scheduled(position)
        return self if method is self.method else replace(self, method=method)

    def resolved(
        self, family: str, num_layers: int, expert: int = 0, steps: int | None = None
    ) -> Self:
        return replace(self, method=self.method.resolved(family, num_layers, expert, steps))
