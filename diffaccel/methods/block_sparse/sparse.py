"""Block-sparse attention made of parts: a selector, a budget, a corrector, an order."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.base import BlockSparseMethod, Parts
from diffaccel.methods.block_sparse.budgets import BUDGETS, Budget
from diffaccel.methods.block_sparse.correctors import CORRECTORS, Corrector
from diffaccel.methods.block_sparse.selectors import SELECTORS, Selector


@dataclass(frozen=True, slots=True, repr=False)
class SparseAttn(BlockSparseMethod):
    """Computes the key blocks whose summary would err most, and summarises the others.

    Lossy: pays where the visual sequence is long (about 8,000 tokens and more). Text queries, and
    visual queries towards text, are exact. The defaults are the most faithful known here: blocks
    are chosen by the error that their summary is expected to make (`ExpectedError`), half of them
    for every query block and half where it helps most within a head (`MixedBudget`), and every
    query weighs the summaries of the others itself, with a term for what values do within a block
    (`BlockSummaries`). Any selector goes with any budget and any corrector; published methods are
    such combinations, with names of their own.

    Args:
        keep: Share of visual key blocks that is computed, above 0 to 1; 1 is dense. Selectors
            that decide alone how many they keep do not look at it.
        selector: What is worth computing: a `Selector`, or its name with its defaults (a key of
            `SELECTORS`).
        corrector: What is done about the rest: a `Corrector`, or a key of `CORRECTORS`. "none"
            gives plain block-sparse attention.
        budget: How the blocks are shared out: a `Budget`, a key of `BUDGETS`, or None for the
            selector's own.
        p_remain, block, order, neighbors, first_frame: As of `BlockSparseMethod`.
        dense_steps, dense_layers: As of `ScheduledMethod`.

    Example:
        >>> layout = TokenLayout.image(64, 64, text_before=512)
        >>> output = SparseAttn(keep=0.2).attend(query, key, value, layout)
        >>> plain = SparseAttn(keep=0.2, selector="pooled", corrector="none")
    """

    keep: float = 0.25
    selector: Selector | str = "expected-error"
    corrector: Corrector | str = "value"
    budget: Budget | str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"keep must lie above 0 and be at most 1, got keep={self.keep}; "
                "0.25 computes a quarter of the key blocks"
            )
        for name, table, kind in (
            ("selector", SELECTORS, Selector),
            ("corrector", CORRECTORS, Corrector),
            ("budget", BUDGETS, Budget),
        ):
            part = getattr(self, name)
            is_known = part in table if isinstance(part, str) else isinstance(part, kind)
            if not is_known and not (name == "budget" and part is None):
                raise ValueError(
                    f"{name} must be a {kind.__name__} or one of {', '.join(table)}, got "
                    f"{name}={part!r}; choose one"
                )
        BlockSparseMethod.__post_init__(self)

    def parts(self) -> Parts:
        """As the knobs name them."""
        selector, corrector, budget = self.selector, self.corrector, self.budget
        selector = SELECTORS[selector]() if isinstance(selector, str) else selector
        corrector = CORRECTORS[corrector] if isinstance(corrector, str) else corrector
        budget = BUDGETS[budget] if isinstance(budget, str) else budget or selector.budget
        return Parts(selector, budget, corrector, self.keep, self.p_remain)
