"""Block-sparse attention made of parts: a selector, a budget, a corrector, an order."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.budgets import BUDGETS, Budget, MixedBudget, RowBudget
from diffaccel.methods.block_sparse.correctors import (
    CORRECTORS,
    BlockSummaries,
    Corrector,
    NoCorrection,
)
from diffaccel.methods.block_sparse.parts import Parts
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
        max_error: Relative error |output - dense| / |dense| of each call that is promised, above 0
            to below 1, in place of `keep`, which is then not looked at: each head gets the share
            of the blocks that 128 exactly computed rows say it needs. Costs about 160 of N rows
            of dense attention, and reads the device once a call to run dense where that is
            faster. Only with correctors that answer row by row: "none", and `BlockSummaries`.
        keep_end: Share at the end of the schedule, as `keep`, which then holds at its start; in
            between it is linear in the share of the schedule that lies behind a step, 0 to
            (n - 1) / n for n steps. None: `keep` throughout, as where nobody says where a call
            stands.
        p_remain, block, order, neighbors, first_frame, reuse, reuse_passes, hysteresis: As of
            `BlockSparseMethod`.
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
    max_error: float | None = None
    _: KW_ONLY
    keep_end: float | None = None
    block: int | None = None
    order: str = "raster"

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("keep", "keep_end"):
            keep = getattr(self, name)
            if keep is not None and not 0.0 < keep <= 1.0:
                raise ValueError(
                    f"{name} must lie above 0 and be at most 1, got {name}={keep}; "
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
        self._check_promise()

    def parts(self) -> Parts:
        """As the knobs name them."""
        selector, corrector, budget = self.selector, self.corrector, self.budget
        selector = SELECTORS[selector]() if isinstance(selector, str) else selector
        corrector = CORRECTORS[corrector] if isinstance(corrector, str) else corrector
        budget = BUDGETS[budget] if isinstance(budget, str) else budget or selector.budget
        return Parts(selector, budget, corrector, self.keep, self.p_remain, self.max_error)

    def _check_promise(self) -> None:
        if self.max_error is None:
            return
        if not 0.0 < self.max_error < 1.0:
            raise ValueError(
                f"max_error must lie above 0 and below 1, got max_error={self.max_error}; 0.05 "
                "promises an output within 5 % of dense attention"
            )
        if self.remembers or self.keep_end is not None:
            raise ValueError(
                "max_error decides in each call how much is kept, so reuse and hysteresis must be "
                "0, reuse_passes False and keep_end None, got "
                f"reuse={self.reuse}, hysteresis={self.hysteresis}, "
                f"reuse_passes={self.reuse_passes}, keep_end={self.keep_end}; leave them out"
            )
        parts = self.parts()
        if not isinstance(parts.corrector, BlockSummaries | NoCorrection):
            raise ValueError(
                "max_error needs a corrector that answers row by row ('none', 'means', "
                f"'variance', 'normaliser', 'output' or 'value'), got corrector={self.corrector!r}"
            )
        if not isinstance(parts.budget, RowBudget | MixedBudget):
            raise ValueError(
                "max_error needs a budget that asks for a share of the blocks ('row', 'mixed' or "
                f"'head'), got budget={parts.budget!r}"
            )
