"""Attention of block means, trusted only where a block is alike within: SpargeAttn's rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffaccel.errors import check_kinds
from diffaccel.kernels import StatisticsCall
from diffaccel.kernels.block_statistics.op import summarise
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, MassBudget
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import visual_attention, without_empty

_STEP_ELEMENTS = 1 << 26  # of normalised tokens that are held at a time


@dataclass(frozen=True, slots=True)
class SelfSimilarity(Selector):
    """Scores by the attention of block means; a block that is not alike within is always computed.

    A mean stands for tokens that point the same way. Where the mean cosine between the tokens of
    a block is below `similarity`, a query block computes all key blocks, and a key block is
    computed by all; the others share the attention that the rest predicts. The first stage of
    "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model
    Inference" (Zhang et al., 2025, https://arxiv.org/abs/2502.18137); its second stage skips
    products within a kernel. There query blocks have 128 tokens and key blocks 64.

    Args:
        similarity: Least mean cosine of a block, -1 to 1: 0.6 goes with a share of the mass, -0.1
            (never) with a number of blocks.
        smooth_keys: Whether the mean of all keys is taken off before cosines are compared.
    """

    similarity: float = 0.6
    smooth_keys: bool = True
    decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if not -1.0 <= self.similarity <= 1.0:
            raise ValueError(
                f"similarity must lie in -1 to 1, got similarity={self.similarity}; it is the "
                "least mean cosine between the tokens of a block"
            )

    @property
    def budget(self) -> Budget:
        """.98 of the attention of each row."""
        return MassBudget(0.98)

    def score(self, rows: BlockRows) -> Tensor:
        """The predicted mass, infinity for rows and columns that are not alike within."""
        query, key = rows.call.once(self, lambda: self._similarity(rows.call))
        is_mixed_key = (key < self.similarity)[:, :, None]
        is_mixed_query = (query[:, :, rows.rows] < self.similarity)[..., None]
        scores = visual_attention(rows, is_mixed_key)
        scores.masked_fill_(is_mixed_key | is_mixed_query, torch.inf)
        return without_empty(scores, rows)

    def _similarity(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Mean cosine of all pairs of tokens of each block of queries and of keys: (B, H, NB)."""
        visual, counts = call.visual, call.statistics.counts
        # The mean of all keys from those of the blocks, which leave padded ones out.
        weights = (counts / counts.sum(-1, keepdim=True).clamp_min(1.0))[:, None, :, None]
        shift = (call.statistics.key_mean * weights).sum(2)[:, None] * self.smooth_keys
        batch, length, heads, channels = visual.key.shape
        step = max(1, _STEP_ELEMENTS // (batch * length * channels))
        found: list[tuple[Tensor, Tensor]] = []
        for head in range(0, heads, step):
            some = slice(head, head + step)
            query = normalize(visual.query[:, :, some].float(), dim=-1)
            key = normalize(visual.key[:, :, some].float() - shift[:, :, some], dim=-1)
            means = summarise(
                StatisticsCall(query, key, key, call.block, visual.valid, needs=frozenset())
            )
            # The mean of u_i . u_j over all i, j is the squared length of the mean of u.
            parts = means.query_mean.square().sum(-1), means.key_mean.square().sum(-1)
            found.append(parts)
        queries, keys = zip(*found, strict=True)
        return torch.cat(queries, 1), torch.cat(keys, 1)
