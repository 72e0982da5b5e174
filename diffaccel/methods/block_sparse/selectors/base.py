"""What every selector is: an opinion about which key blocks are worth computing exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, RowBudget
from diffaccel.methods.block_sparse.order import TokenOrder


@dataclass(frozen=True, slots=True)
class Selector:
    """Scores key blocks for query blocks; a `Budget` then decides how many are kept.

    A subclass is a frozen dataclass whose fields are its configuration.
    """

    gives_mass: ClassVar[bool] = False
    """Whether scores are shares of the attention mass, so that the text's share counts too."""
    decides: ClassVar[bool] = False
    """Whether the selector itself decides about some blocks, which it then scores infinity."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics beside the means of query and key, as `StatisticsCall.needs` names them."""
        return frozenset()

    @property
    def budget(self) -> Budget:
        """What is used where nobody names a budget: the rule that was published with it."""
        return RowBudget()

    @property
    def compares_heads(self) -> bool:
        """Whether the scores of one head depend on the others."""
        return False

    def score(self, rows: BlockRows) -> Tensor:
        """Scores every key block for some query blocks.

        Returns:
            (B, H, R, NB) fp32, at least 0. Larger is worth more, 0 is never kept. Infinity is
            always kept, outside the budget, if the selector `decides`. NaN, what becomes of
            tokens that are not finite, comes before all numbers, so that it shows in the output.
            One head may stand for all (H = 1 is expanded), and one sample.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement score")

    def forced(self, order: TokenOrder) -> Tensor | None:
        """Says which pairs of blocks are always kept for a grid: (NB, NB) bool, or None."""
        return None

    def share(self, order: TokenOrder) -> float | None:
        """Share of the blocks with a score above 0 in a grid; None where the data decide."""
        return None
