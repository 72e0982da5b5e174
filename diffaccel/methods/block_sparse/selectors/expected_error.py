"""The blocks whose summary is expected to be most wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, MixedBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class ExpectedError(Selector):
    """Scores a block by the error that leaving it to its summary is expected to make.

    Much attention is no reason to compute a block whose keys and values are all alike: its
    summary answers as well. With P the predicted attention, and for normally distributed keys,

        score_nm = P_nm * sqrt(exp(s**2 * sum_d((mean_q_d**2 + var_q_d) * var_k_d)) - 1) * dev_v

    where the root is the relative deviation of the weights exp(s * q . k) within block m, for the
    queries of block n, and dev_v that of its values around their mean. An estimate: keys and
    values are taken as independent and channels as uncorrelated. Own design.

    Args:
        largest_exponent: What the exponent is clamped to, above 0: beyond it keys are not
            normally distributed, and the formula overshoots.
        own_block: Whether a query block always keeps the key block of the same tokens.
    """

    largest_exponent: float = 4.0
    own_block: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.largest_exponent > 0:
            raise ValueError(
                "largest_exponent must be above 0, got largest_exponent="
                f"{self.largest_exponent}; 4 suits most models"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the formula takes."""
        return frozenset({"query_variance", "key_variance", "value_deviation"})

    @property
    def budget(self) -> Budget:
        """Half to every row, half to the best of all rows of a head."""
        return MixedBudget()

    def score(self, rows: BlockRows) -> Tensor:
        """The expected error of each block."""
        call, part = rows.call, rows.rows
        statistics, scale = call.statistics, call.visual.scale
        power = statistics.query_mean[:, :, part].square() + statistics.query_variance[:, :, part]
        exponent = (power * scale**2) @ statistics.key_variance.mT
        deviation = exponent.clamp_(max=self.largest_exponent).expm1_().sqrt_()
        deviation *= statistics.value_deviation[:, :, None]
        return deviation.mul_(rows.probability[..., :-1])

    def forced(self, order: TokenOrder) -> Tensor | None:
        """The own block."""
        return torch.eye(order.blocks, dtype=torch.bool) if self.own_block else None
