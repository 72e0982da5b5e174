"""Budgets: how many blocks are computed, and how they are shared out.

A selector says which blocks are worth most; a budget says where to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels.block_selection.call import SelectionCall
from diffaccel.kernels.block_selection.op import select


class Scores(NamedTuple):
    """What a selector thinks of the key blocks of R query blocks.

    Args:
        blocks: (B, H, R, NB) fp32, at least 0. Larger is worth more, 0 is never kept, infinity
            always.
        text: (B, H, R) fp32, what the text has, which is computed anyway; None where scores are
            no shares of the attention mass.
        forced: (R, NB) bool, blocks that are kept whatever their score, or None.
        always: Broadcastable to (B, H, R, NB) bool, what is kept in any case: forced blocks with
            tokens, and those that the selector keeps outside the budget, whose score is 0; or
            None.
    """

    blocks: Tensor
    text: Tensor | None = None
    forced: Tensor | None = None
    always: Tensor | None = None


class Ask(NamedTuple):
    """How much is asked for.

    Args:
        keep: Share of the key blocks, above 0 to 1, or one for each head, (B, H) fp32.
        p_remain: Share of the attention mass that is kept at least, 0 to 1, where scores are mass.
    """

    keep: float | Tensor
    p_remain: float = 0.0

    def per_row(self, blocks: int) -> int:
        """Blocks of one row, at most, out of `blocks`."""
        # (1 - 0.8) * 10 is 1.9999999999999996 in floating point and means 2.
        if isinstance(self.keep, Tensor):
            return blocks
        return min(blocks, max(1, int(self.keep * blocks + 1e-6)))

    def part(self, share: float) -> Ask:
        """Asks for a part of it."""
        return self._replace(keep=self.keep * share)

    def selection(self, scores: Scores) -> SelectionCall:
        """The call that gives every row of a head its blocks."""
        blocks, budgets = scores.blocks.shape[-1], None
        if isinstance(self.keep, Tensor):
            budgets = (self.keep * blocks + 1e-6).int()
        return SelectionCall(
            scores.blocks, self.per_row(blocks), self.p_remain, scores.text, scores.forced,
            return_kept=True, budgets=budgets,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """Decides which blocks are kept."""

    looks_at_all_rows: ClassVar[bool] = False
    counts_forced: ClassVar[bool] = False

    @property
    def compares_heads(self) -> bool:
        """Whether what one head keeps depends on the others."""
        return False

    def threshold(self, scores: Scores, ask: Ask) -> Tensor | None:
        """Finds what a block must have to be kept, from all rows or an even sample of them.

        Returns:
            Broadcastable to (B, H, R, NB), or None where rows are decided one by one.
        """
        return None

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """Chooses blocks: (B, H, R, NB) bool."""
        raise NotImplementedError(f"{type(self).__name__} does not implement kept")

    def kept_of_all(self, scores: Scores, ask: Ask) -> Tensor:
        """Chooses blocks where these are all rows: (B, H, R, NB) bool."""
        return self.kept(scores, ask, self.threshold(scores, ask))

    def share(self, blocks: int, ask: Ask) -> float | None:
        """Share of the blocks that is kept, forced ones apart; None where the data decide."""
        return None

    def max_count(self, blocks: int, forced: int, ask: Ask) -> int:
        """Upper bound of the blocks of one row, known without looking at the data."""
        return blocks


@dataclass(frozen=True, slots=True)
class RowBudget(Budget):
    """Every row keeps equally many blocks, or more where those have less than `p_remain`.

    Per row: the first n blocks in descending order, n the larger of `int(keep * NB)` (at least 1)
    and the number of blocks that it takes to exceed `p_remain`. Ties go to the lowest index.
    """

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """Chooses blocks."""
        return select(ask.selection(scores))[2]

    def share(self, blocks: int, ask: Ask) -> float:
        """As asked; a floor on the kept mass may keep more."""
        return ask.per_row(blocks) / blocks

    def max_count(self, blocks: int, forced: int, ask: Ask) -> int:
        """Exact without a floor on the kept mass."""
        return blocks if ask.p_remain > 0 else min(blocks, ask.per_row(blocks) + forced)


@dataclass(frozen=True, slots=True)
class MixedBudget(Budget):
    """A part goes to every row alike, the rest to the blocks with the best scores of all rows.

    Rows whose attention is spread out need more blocks than others; a floor for each row is
    needed where scores of rows are not comparable. Forced blocks count towards the budget.

    Args:
        row_share: Part of the budget that every row gets, 0 to 1.
        across_heads: Whether the rest is shared out over all heads of a sample together; False
            over the rows of each head, which keeps heads independent of each other.
    """

    row_share: float = 0.5
    across_heads: bool = False
    looks_at_all_rows: ClassVar[bool] = True
    counts_forced: ClassVar[bool] = True

    @property
    def compares_heads(self) -> bool:
        """Whether heads share a budget."""
        return self.across_heads

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 <= self.row_share <= 1.0:
            raise ValueError(
                f"row_share must lie in 0 to 1, got row_share={self.row_share}; it is the part of "
                "the budget that every query block gets"
            )

    def threshold(self, scores: Scores, ask: Ask) -> Tensor:
        """The score of the last block that the rest of the budget pays for."""
        return self._last_paid(scores, ask, self._certain(scores, ask))

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """Chooses blocks; ties with the last one that is paid for are kept."""
        return _with_paid(self._certain(scores, ask), scores, threshold)

    def kept_of_all(self, scores: Scores, ask: Ask) -> Tensor:
        """Chooses blocks, the part of each row once."""
        certain = self._certain(scores, ask)
        return _with_paid(certain, scores, self._last_paid(scores, ask, certain))

    def share(self, blocks: int, ask: Ask) -> float | None:
        """As asked for."""
        return None if isinstance(ask.keep, Tensor) else ask.keep

    def _certain(self, scores: Scores, ask: Ask) -> Tensor:
        return select(ask.part(self.row_share).selection(scores))[2]

    def _last_paid(self, scores: Scores, ask: Ask, certain: Tensor) -> Tensor:
        rest = scores.blocks.masked_fill(certain, -1.0)
        start = 1 if self.across_heads else 2
        rest, used = rest.flatten(start), certain.flatten(start).sum(-1, keepdim=True)
        if isinstance(ask.keep, Tensor):
            keep = ask.keep.mean(1, keepdim=True) if self.across_heads else ask.keep[..., None]
            total: Any = (keep * rest.shape[-1]).round().long()
            ranked = rest.sort(-1, descending=True).values
        else:
            total = round(ask.keep * rest.shape[-1])
            ranked = rest.topk(total, dim=-1).values
        ranked = torch.nn.functional.pad(ranked, (1, 0), value=torch.inf)
        return _per_row(ranked.gather(-1, (total - used).clamp_(min=0)))


@dataclass(frozen=True, slots=True)
class MassBudget(Budget):
    """Keeps the fewest blocks that have a share of the score ("top-p").

    Forced blocks count towards the mass.

    Args:
        mass: That share, 0 to 1; of the attention mass, text included, where scores are mass.
        across_rows: Whether all rows of a head share one budget, or each has its own.
        across_heads: Whether all heads of a sample share it too; needs `across_rows`.
        least: Share of the blocks that every row keeps at least, 0 to 1.
    """

    mass: float = 0.9
    across_rows: bool = False
    across_heads: bool = False
    least: float = 0.0
    looks_at_all_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 <= self.mass <= 1.0:
            raise ValueError(
                f"mass must lie in 0 to 1, got mass={self.mass}; 0.9 keeps nine tenths"
            )
        if not 0.0 <= self.least <= 1.0:
            raise ValueError(
                f"least must lie in 0 to 1, got least={self.least}; it is the share of the blocks "
                "that every row keeps at least"
            )
        if self.across_heads and not self.across_rows:
            raise ValueError(
                "across_heads needs across_rows=True, got across_rows=False; heads share a budget "
                "of all their rows"
            )

    @property
    def compares_heads(self) -> bool:
        """Whether heads share a budget."""
        return self.across_heads

    def threshold(self, scores: Scores, ask: Ask) -> Tensor | None:
        """The score of the last block that is needed, where rows share a budget."""
        if not self.across_rows:
            return None
        start = 1 if self.across_heads else 2
        blocks = scores.blocks.nan_to_num(nan=torch.inf)
        mass = blocks.masked_fill(blocks.isinf(), 0.0)
        total = mass.flatten(start).sum(-1, keepdim=True)
        covered = torch.zeros_like(total)
        if scores.text is not None:
            covered = scores.text.flatten(start).sum(-1, keepdim=True)
            total = total + covered
        if scores.forced is not None:
            covered = covered + (mass * scores.forced).flatten(start).sum(-1, keepdim=True)
            blocks = blocks.masked_fill(scores.forced, 0.0)
        ranked = blocks.flatten(start).sort(-1, descending=True).values
        mass = ranked.masked_fill(ranked.isinf(), 0.0).cumsum(-1)
        # The smallest mass is the last in the sum and gone in its rounding.
        is_missing = mass + covered < self.mass * total * (1.0 - 1e-6)
        count = is_missing.sum(-1, keepdim=True).clamp_(max=ranked.shape[-1] - 1)
        last = ranked.gather(-1, count)
        return _per_row(last.masked_fill(covered >= self.mass * total, torch.inf))

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """Chooses blocks, at least one in each row."""
        if self.mass == 1.0:  # sums that round up would lose the last
            return PositiveBudget().kept(scores, ask, None)
        if threshold is None:
            return self._kept_of_rows(scores)
        return _with_paid(select(Ask(self.least).selection(scores))[2], scores, threshold)

    def _kept_of_rows(self, scores: Scores) -> Tensor:
        blocks, covered, ask = scores.blocks, scores.text, Ask(self.least, self.mass)
        mass = blocks.masked_fill(~blocks.isfinite(), 0.0)
        if covered is None:  # scores of a row then need not sum to 1
            total = mass.sum(-1, keepdim=True).clamp_min(1e-30)
            blocks, mass = blocks / total, mass / total
        if scores.forced is None:
            return select(ask.selection(Scores(blocks, covered)))[2]
        certain = (mass * scores.forced).sum(-1)
        covered = certain if covered is None else covered + certain
        rest = Scores(blocks.masked_fill(scores.forced, 0.0), covered)
        return select(ask.selection(rest))[2] | (scores.forced & (scores.blocks > 0))


@dataclass(frozen=True, slots=True)
class PositiveBudget(Budget):
    """Keeps every block with a score above 0: the selector alone decides."""

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """Chooses blocks."""
        kept = (scores.blocks > 0) | scores.blocks.isnan()
        return kept if scores.forced is None else kept | scores.forced


BUDGETS: dict[str, Budget] = {
    "row": RowBudget(),
    "mixed": MixedBudget(),
    "head": MixedBudget(row_share=0.0),
    "global": MixedBudget(row_share=0.0, across_heads=True),
    "mass": MassBudget(),
    "positive": PositiveBudget(),
}
"""Name -> budget with its defaults."""


def with_mass(probability: Tensor, mass: float) -> Tensor:
    """Chooses the fewest blocks that have a share of the attention mass, text included.

    Args:
        probability: (B, H, R, NB + 1) fp32 from `block_attention`.
        mass: That share, 0 to 1.

    Returns:
        (B, H, R, NB) bool, at least one in each row.
    """
    visual, text = probability[..., :-1], probability[..., -1]
    return select(Ask(0.0, mass).selection(Scores(visual, text)))[2]


def _with_paid(certain: Tensor, scores: Scores, threshold: Tensor | None) -> Tensor:
    """Adds to a choice (B, H, R, NB) the blocks that reach a threshold."""
    if threshold is None:
        return certain
    return certain | ((scores.blocks >= threshold) & (scores.blocks > 0))


def _per_row(last: Tensor) -> Tensor:
    """Makes a number for each sample or head broadcastable to (B, H, R, NB)."""
    return last.reshape(*last.shape, *(1,) * (4 - last.dim()))
