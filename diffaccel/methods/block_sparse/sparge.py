"""SpargeAttention: block means where blocks are alike within, all else computed (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.budgets import MassBudget, RowBudget
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import SelfSimilarity


@dataclass(frozen=True, slots=True, repr=False)
class SpargeAttn(PublishedSparseAttn):
    """Computes most of the attention that block means predict, and all blocks of mixed tokens.

    "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model
    Inference" (Zhang et al., 2025, https://arxiv.org/abs/2502.18137), its first stage:
    `SelfSimilarity`, along a Hilbert curve as there.

    Args:
        mass: Share of the predicted attention of each row that is computed, 0 to 1.
        similarity: Least mean cosine between the tokens of a block that is not always computed, -1
            to 1.
        keep: Share of the key blocks instead of `mass`, above 0 to 1; 0.5 goes with
            similarity=-0.1.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    mass: float = 0.98
    _: KW_ONLY
    similarity: float = 0.6
    keep: float | None = None

    def parts(self) -> Parts:
        """The rule, with a share of the mass or of the blocks of each row."""
        selector = SelfSimilarity(self.similarity)
        if self.keep is None:
            return self.combined(selector, budget=MassBudget(self.mass))
        return self.combined(selector, self.keep, RowBudget())
