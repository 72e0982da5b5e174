"""The blocks with the largest attention between block means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.selectors.base import Selector


@dataclass(frozen=True, slots=True)
class PooledAttention(Selector):
    """Scores a block by its share of the attention of the mean query (`block_attention`).

    The selection of "Rectified SpaAttn" (2025, https://arxiv.org/abs/2511.19835) and of others
    before it, with the number of tokens of each block in its logit.
    """

    gives_mass: ClassVar[bool] = True

    def score(self, rows: BlockRows) -> Tensor:
        """The predicted mass of each block."""
        return rows.probability[..., :-1]
