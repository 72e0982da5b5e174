"""The blocks that hold nearly all of the attention among visual tokens: as in sparse VGGT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, MassBudget
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import visual_attention


@dataclass(frozen=True, slots=True)
class VisualAttention(Selector):
    """Scores a block by its share of the attention of the mean query among visual blocks.

    Unlike `PooledAttention` it leaves the text out, so that rows with much of it keep as many
    blocks as others. The selection of "Faster VGGT with Block-Sparse Global Attention" (2025,
    https://arxiv.org/abs/2509.07120), whose special tokens are text here.
    """

    @property
    def budget(self) -> Budget:
        """The larger of .97 of the attention and a quarter of the blocks."""
        return MassBudget(0.97, least=0.25)

    def score(self, rows: BlockRows) -> Tensor:
        """The predicted mass."""
        return visual_attention(rows)
