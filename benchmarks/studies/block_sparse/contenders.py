"""What the study compares: combinations of parts, each over a range of its knob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

from diffaccel.benchmarks.studies.block_sparse.cost import added_cost
from diffaccel.methods.base import Method
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.budgets import Ask, MixedBudget
from diffaccel.methods.block_sparse.correctors import CORRECTORS
from diffaccel.methods.block_sparse.rectified import RectifiedSpaAttn
from diffaccel.methods.block_sparse.selectors import SELECTORS
from diffaccel.methods.block_sparse.selectors.tau import ProxyDeviations
from diffaccel.methods.block_sparse.sparse import SparseAttn

KEEPS = (0.10, 0.20, 0.05, 0.30)
TAUS = (1.5, 1.0, 2.2, 0.6)
"""The most telling first."""
GRID_KEEPS = (0.10, 0.20)
GRID_ORDER = "raster"
BLOCK = 64
ORDERS = ("raster", "brick")
DEFAULT = "SparseAttn"

Build = Callable[[float, str, int], BlockSparseMethod]
"""Makes the method of a knob value, order and block."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A family of methods with one knob, the share of blocks or what stands for it.

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
    build: Build

    def method(self, keep: float) -> Method:
        """The method at a value of the knob."""
        return self.build(keep, self.order, self.block)

    @property
    def added(self) -> float:
        """What it computes beside blocks, in terms of dense attention."""
        parts = self.build(self.keeps[0], self.order, self.block).parts()
        return added_cost(parts.selector, parts.corrector, self.block)


def combined(selector: str, corrector: str, budget: str | None = None) -> Build:
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


def reference() -> list[Contender]:
    """The default, and Sol-Attn by both of its rules in its own order."""
    default = combined("expected-error", "value")
    return [
        Contender(DEFAULT, "raster", BLOCK, KEEPS, default),
        Contender("Sol-Attn top-k", "raster", BLOCK, KEEPS, sol_top_k),
        Contender("Sol-Attn tau", "raster", BLOCK, TAUS, sol_tau),
    ]


def variants() -> list[Contender]:
    """Cheaper ones, those in the other order, what the default replaces, and Rectified."""
    default = combined("expected-error", "value")
    found: dict[str, Build] = {
        "SparseAttn without value term": combined("expected-error", "output"),
        "top-k + normaliser fit": combined("pooled", "normaliser"),
        "top-k alone": combined("pooled", "none"),
        "Rectified": rectified,
    }
    return [
        *(Contender(name, "raster", BLOCK, KEEPS, build) for name, build in found.items()),
        Contender(DEFAULT, "brick", BLOCK, KEEPS, default),
        Contender("Sol-Attn top-k", "brick", BLOCK, KEEPS, sol_top_k),
        Contender(
            "top-k + normaliser fit", "brick", BLOCK, KEEPS, found["top-k + normaliser fit"]
        ),
    ]


def shared() -> list[Contender]:
    """The default with a budget for all heads together."""
    return [Contender("SparseAttn, budget over heads", "raster", BLOCK, KEEPS, over_heads)]


def larger() -> list[Contender]:
    """The default with larger blocks."""
    build = combined("expected-error", "value")
    return [Contender(DEFAULT, order, 128, KEEPS, build) for order in ORDERS]


def ablations() -> list[Contender]:
    """What each part of the published rectification and of Sol-Attn's rule brings."""
    found: dict[str, Build] = {
        "Rectified, no gapr": partial(rectified, gapr=False),
        "Rectified, no neighbors": partial(rectified, neighbors=False),
        "Sol-Attn top-k, no diagonal": partial(sol_top_k, diagonal=-1),
        "Sol-Attn top-k, no tail": partial(sol_top_k, corrector="none"),
    }
    return [Contender(name, "raster", BLOCK, KEEPS, build) for name, build in found.items()]


def over_heads(keep: float, order: str, block: int) -> SparseAttn:
    """The default with what is left of the budget given to the best blocks of all heads."""
    return SparseAttn(keep, budget=MixedBudget(across_heads=True), order=order, block=block)


def sol_top_k(
    keep: float, order: str, block: int, diagonal: int = 1, corrector: str = "tail"
) -> SparseAttn:
    """Sol-Attn with a share of each row."""
    selector = ProxyDeviations(tau=None, diagonal=diagonal)
    return SparseAttn(keep, selector=selector, corrector=corrector, order=order, block=block)


def sol_tau(tau: float, order: str, block: int) -> SparseAttn:
    """Sol-Attn with its threshold."""
    selector = ProxyDeviations(tau=tau)
    return SparseAttn(0.5, selector=selector, corrector="tail", order=order, block=block)


def rectified(
    keep: float, order: str, block: int, gapr: bool = True, neighbors: bool = True
) -> RectifiedSpaAttn:
    """Rectified SpaAttn without its floor on the attention mass, which would set the density."""
    return RectifiedSpaAttn(
        1.0 - keep, p_remain=0.0, gapr=gapr, neighbors=neighbors, order=order, block=block
    )


def grid() -> list[Contender]:
    """Every selector with every corrector."""
    return [
        Contender(
            f"{selector} + {corrector}", GRID_ORDER, BLOCK, keeps_for(selector, GRID_KEEPS),
            combined(selector, corrector),
        )
        for selector, corrector in product(SELECTORS, CORRECTORS)
    ]  # fmt: skip


CONTENDERS: dict[str, Callable[[], list[Contender]]] = {
    "reference": reference,
    "variants": variants,
    "shared": shared,
    "larger": larger,
    "ablations": ablations,
    "grid": grid,
}
"""Name -> what runs."""
