"""What the study compares: combinations of parts, each over a range of its knob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from diffaccel.benchmarks.studies.block_sparse.cost import added_cost
from diffaccel.methods.base import Method
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.budgets import Ask
from diffaccel.methods.block_sparse.correctors import CORRECTORS
from diffaccel.methods.block_sparse.selectors import SELECTORS
from diffaccel.methods.block_sparse.sparse import SparseAttn

KEEPS = (0.02, 0.05, 0.10, 0.15, 0.20, 0.30)
GRID_KEEPS = (0.05, 0.10, 0.20)
BLOCK = 64
ORDERS = ("raster", "brick")
DEFAULT = "SparseAttn"


@dataclass(frozen=True, slots=True)
class Contender:
    """A family of methods with one knob.

    Args:
        name: In tables.
        order: Token order.
        block: Tokens per block.
        keeps: Values of the knob.
        build: Makes the method of a knob value, order and block.
    """

    name: str
    order: str
    block: int
    keeps: tuple[float, ...]
    build: Callable[[float, str, int], BlockSparseMethod]

    def method(self, keep: float) -> Method:
        """The method at a value of the knob."""
        return self.build(keep, self.order, self.block)

    @property
    def added(self) -> float:
        """What it computes beside blocks, in terms of dense attention."""
        parts = self.build(self.keeps[0], self.order, self.block).parts()
        return added_cost(parts.selector, parts.corrector, self.block)


def combined(
    selector: str, corrector: str, budget: str | None = None
) -> Callable[[float, str, int], BlockSparseMethod]:
    """Builds `SparseAttn` of named parts."""

    def build(keep: float, order: str, block: int) -> BlockSparseMethod:
        return SparseAttn(
            keep, selector=selector, corrector=corrector, budget=budget, order=order, block=block
        )

    return build


def keeps_for(selector: str, keeps: tuple[float, ...]) -> tuple[float, ...]:
    """The shares to try: one where the selector alone decides how many blocks it keeps."""
    is_asked = SELECTORS[selector]().budget.share(BLOCK, Ask(keeps[0])) is not None
    return keeps if is_asked else keeps[:1]


def named() -> list[Contender]:
    """The default, its cheaper variants, what it replaces, and the reference."""
    found = {
        DEFAULT: combined("expected-error", "value"),
        "without value term": combined("expected-error", "output"),
        "row budget, without value term": combined("expected-error", "output", "row"),
        "top-k + normaliser fit": combined("pooled", "normaliser"),
        "top-k + none": combined("pooled", "none"),
    }
    return [
        Contender(name, order, BLOCK, KEEPS, build)
        for name, build in found.items()
        for order in ORDERS
    ] + [Contender(DEFAULT, order, 128, KEEPS, found[DEFAULT]) for order in ORDERS]


def grid() -> list[Contender]:
    """Every selector with every corrector."""
    return [
        Contender(
            f"{selector} + {corrector}", order, BLOCK, keeps_for(selector, GRID_KEEPS),
            combined(selector, corrector),
        )
        for selector, corrector, order in product(SELECTORS, CORRECTORS, ORDERS)
    ]  # fmt: skip


CONTENDERS: dict[str, Callable[[], list[Contender]]] = {"named": named, "grid": grid}
