"""What a block-sparse method is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Ask, Budget, Scores
from diffaccel.methods.block_sparse.correctors.base import Corrector
from diffaccel.methods.block_sparse.selectors.base import Selector


class Parts(NamedTuple):
    """What a block-sparse method is made of.

    Args:
        selector: Which blocks are worth computing.
        budget: How many are.
        corrector: What is done about the others.
        keep: Share of the key blocks that the budget gives out.
        p_remain: Share of the attention mass that is computed at least.
        max_error: Relative error that is promised, in place of `keep`; None for no promise.
    """

    selector: Selector
    budget: Budget
    corrector: Corrector
    keep: float
    p_remain: float = 0.0
    max_error: float | None = None

    def scores(self, rows: BlockRows, forced: Tensor | None) -> Scores:
        """What the selector thinks of the key blocks of some query blocks.

        Args:
            rows: The query blocks, R of them.
            forced: (R, NB) bool, blocks that are kept whatever their score, or None.
        """
        text = rows.probability[..., -1] if self.selector.gives_mass else None
        score, always = self.selector.score(rows), None
        if score.shape[:2] != rows.query_mean.shape[:2]:
            score = score.expand(*rows.query_mean.shape[:3], -1)
        if self.selector.decides:
            always = score.isposinf()
            score = score.masked_fill(always, 0.0)
        if forced is not None:  # whatever their score, unless they are padding
            certain = forced & (rows.call.statistics.counts > 0)[:, None, None]
            always = certain if always is None else always | certain
        return Scores(score, text, forced, always)

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """What the budget keeps, and what is kept always: (B, H, R, NB) bool."""
        return _with_always(self.budget.kept(scores, ask, threshold), scores)

    def kept_of_all(self, scores: Scores, ask: Ask) -> Tensor:
        """The same where these are all rows."""
        return _with_always(self.budget.kept_of_all(scores, ask), scores)

    @property
    def ask(self) -> Ask:
        """What the budget is told: a floor on the mass only where scores are mass."""
        return Ask(self.keep, self.p_remain if self.selector.gives_mass else 0.0)

    @property
    def floor(self) -> float:
        """Mass that is kept at least, where the budget cannot see to it."""
        return 0.0 if self.selector.gives_mass else self.p_remain

    @property
    def compares_heads(self) -> bool:
        """Whether heads cannot be computed apart."""
        return self.selector.compares_heads or self.budget.compares_heads


def _with_always(kept: Tensor, scores: Scores) -> Tensor:
    return kept if scores.always is None else kept | scores.always
