"""Methods around another one, which decides about everything that they do not change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method, Work

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, slots=True)
class WrappingMethod(Method):
    """A method whose field `method` holds another, and follows that one's schedule and cost.

    A subclass has the field and implements `attend_with_density`.
    """

    def runs_dense(
        self,
        layer: int | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> bool:
        """Never here: the inner method follows its own schedule."""
        return False

    def dense_reason(self, layout: TokenLayout) -> str:
        """That of the inner method."""
        return self.method.dense_reason(layout)

    def expected_density(self, layout: TokenLayout) -> float | None:
        """That of the inner method."""
        return self.method.expected_density(layout)

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """That of the inner method."""
        return self.method.expected_cost(layout, device)

    def work(self, layout: TokenLayout, query: Tensor, layer: int | None = None) -> Work | None:
        """That of the inner method."""
        return self.method.work(layout, query, layer)

    def resolved(self, family: str, num_layers: int, expert: int = 0) -> Self:
        """Fills the schedule of the inner method."""
        return replace(self, method=self.method.resolved(family, num_layers, expert))
