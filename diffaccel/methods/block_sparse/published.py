"""What published combinations of a selector, a budget and a corrector share."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.budgets import Budget
from diffaccel.methods.block_sparse.correctors import CORRECTORS, Corrector
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.selectors.base import Selector


@dataclass(frozen=True, slots=True, repr=False)
class PublishedSparseAttn(BlockSparseMethod):
    """A combination of parts with the defaults of its authors, their schedule included.

    Lossy, as all that leaves blocks out. Text queries, and visual queries towards text, are exact.
    Steps that its authors run dense are a share of the schedule here, so that they are none of a
    run of few steps.

    Args:
        corrector: What is done about left-out blocks: a `Corrector`, or a key of `CORRECTORS`.
            "none", what most were published with, gives plain block-sparse attention.
    """

    _: KW_ONLY
    corrector: Corrector | str = "none"

    def __post_init__(self) -> None:
        check_kinds(self)
        corrector = self.corrector
        is_known = corrector in CORRECTORS if isinstance(corrector, str) else True
        if not is_known or not isinstance(corrector, (str, Corrector)):
            raise ValueError(
                f"corrector must be a Corrector or one of {', '.join(CORRECTORS)}, got "
                f"corrector={corrector!r}; choose one"
            )
        BlockSparseMethod.__post_init__(self)
        self.parts()  # parts check the knobs that they get

    def combined(
        self, selector: Selector, keep: float = 1.0, budget: Budget | None = None
    ) -> Parts:
        """Puts the parts together, the budget by default that of the selector."""
        if not 0.0 < keep <= 1.0:
            raise ValueError(
                f"keep must lie above 0 and be at most 1, got {keep=}; 0.25 computes a quarter "
                "of the key blocks"
            )
        corrector = self.corrector
        corrector = CORRECTORS[corrector] if isinstance(corrector, str) else corrector
        return Parts(selector, budget or selector.budget, corrector, keep, self.p_remain)
