"""Per head, the attention of block means or columns and diagonals: FlexPrefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.budgets import Budget, MassBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.sampled_rows import spread_rows
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import visual_attention

_STEP_ELEMENTS = 1 << 26  # scores that are held at a time, in fp32


class HeadPatterns(NamedTuple):
    """What was found out about the heads of a call.

    Args:
        is_aware: (B, H) bool, whether block means predict the attention of a head.
        columns: (B, H, NB) bool, key blocks that all queries of a head keep.
        diagonals: (B, H, 2 * NB - 1) bool, kept distances m - n + NB - 1.
        least_columns: As `columns`, the few that are kept in any case.
        least_diagonals: Likewise.
    """

    is_aware: Tensor
    columns: Tensor
    diagonals: Tensor
    least_columns: Tensor
    least_diagonals: Tensor


@dataclass(frozen=True, slots=True)
class FlexPrefill(Selector):
    """Scores by the attention of block means in heads where that predicts well.

    The attention of some query rows is computed exactly. Where its mass per key block is near the
    one that block means predict (the root of the Jensen-Shannon divergence is below
    `divergence`), a head keeps the fewest blocks of all its rows with a share `mass` of the
    predicted attention. Other heads keep columns and diagonals of blocks, the fewest that have
    that share of the exact mass each. "FlexPrefill: A Context-Aware Sparse Attention Mechanism
    for Efficient Long-Sequence Inference" (Lai et al., 2025, https://arxiv.org/abs/2502.20766).
    Since attention is not causal here, rows are spread over the sequence instead of being the last
    ones, and diagonals lie on both sides.

    Args:
        mass: Share of the attention, 0 to 1.
        divergence: Largest root of the divergence that counts as near, at least 0.
        rows: Query rows that are computed, at least 1.
        least: Tokens that columns, and diagonals, hold at least, in every head.
    """

    mass: float = 0.9
    divergence: float = 0.1
    rows: int = 128
    least: int = 512
    decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 <= self.mass <= 1.0:
            raise ValueError(f"mass must lie in 0 to 1, got mass={self.mass}; 0.9 is published")
        if not self.divergence >= 0 or self.rows < 1 or self.least < 0:
            raise ValueError(
                "divergence and least must be at least 0, rows at least 1, got "
                f"divergence={self.divergence}, least={self.least}, rows={self.rows}; "
                "0.1, 512 and 128 are published"
            )

    @property
    def budget(self) -> Budget:
        """The fewest blocks of a head with a share of the attention."""
        return MassBudget(self.mass, across_rows=True)

    def score(self, rows: BlockRows) -> Tensor:
        """The predicted mass, infinity for columns and diagonals."""
        found: HeadPatterns = rows.call.once(self, lambda: self._patterns(rows.call))
        place = torch.arange(rows.call.number, device=found.columns.device)
        apart = place - place[rows.rows, None] + rows.call.number - 1
        is_aware = found.is_aware[..., None, None]
        lines = found.columns[:, :, None] | found.diagonals[:, :, apart]
        always = found.least_columns[:, :, None] | found.least_diagonals[:, :, apart]
        always = torch.where(is_aware, always, lines)
        scores = visual_attention(rows).masked_fill_(~is_aware, 0.0)
        return scores.masked_fill_(always, torch.inf)

    def forced(self, order: TokenOrder) -> Tensor:
        """The main diagonal and the first column."""
        kept = torch.eye(order.blocks, dtype=torch.bool)
        kept[:, 0] = True
        return kept

    def _patterns(self, call: BlockCall) -> HeadPatterns:
        length, number = call.visual.query.shape[1], call.number
        rows = spread_rows(length, self.rows, call.visual.query.device)
        block = rows // call.block
        mass = _exact_mass(call, rows)  # (B, H, R, NB)
        predicted = torch.cat([visual_attention(x) for x in call.rows()], 2)[:, :, block]
        if call.visual.valid is not None:
            is_real = call.visual.valid[:, None, rows, None]
            mass, predicted = mass * is_real, predicted * is_real
        columns = mass.sum(2)
        place = torch.arange(number, device=rows.device)
        apart = (place - block[:, None] + number - 1).expand_as(mass).flatten(2)
        diagonals = mass.new_zeros(*mass.shape[:2], 2 * number - 1)
        diagonals.scatter_add_(-1, apart, mass.flatten(2))
        distance = _divergence(columns, predicted.sum(2)).sqrt()
        least = -(-self.least // call.block)
        return HeadPatterns(
            distance < self.divergence,
            _fewest(columns, self.mass, least),
            _fewest(diagonals, self.mass, least),
            _fewest(columns, 0.0, least),
            _fewest(diagonals, 0.0, least),
        )


def _exact_mass(call: BlockCall, rows: Tensor) -> Tensor:
    """Attention of query rows (R,) to the visual tokens of each block: (B, H, R, NB) fp32."""
    visual = call.visual
    query = visual.query[:, rows].transpose(1, 2).float() * visual.scale
    batch, heads = query.shape[:2]
    length = visual.key.shape[1]
    step = max(1, _STEP_ELEMENTS // (batch * len(rows) * length))
    parts = []
    for head in range(0, heads, step):
        some = slice(head, head + step)
        scores = query[:, some] @ visual.key[:, :, some].float().permute(0, 2, 3, 1)
        if visual.valid is not None:
            scores.masked_fill_(~visual.valid[:, None, None], -torch.inf)
        weights = scores.softmax(-1).nan_to_num_(nan=0.0)
        weights = torch.nn.functional.pad(weights, (0, call.number * call.block - length))
        parts.append(weights.unflatten(-1, (call.number, call.block)).sum(-1))
    return torch.cat(parts, 1)


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of (..., n) weights, natural log: (...)."""
    a, b = (x / x.sum(-1, keepdim=True).clamp_min(1e-30) for x in (a, b))
    middle = (a + b) / 2
    apart = [x * (x.clamp_min(1e-30) / middle.clamp_min(1e-30)).log() for x in (a, b)]
    return ((apart[0] + apart[1]).sum(-1) / 2).clamp_min(0.0)


def _fewest(mass: Tensor, share: float, least: int) -> Tensor:
    """The fewest of (..., n) that have a share of the sum, at least some number: bool."""
    ranked, place = mass.sort(-1, descending=True)
    needed = (ranked.cumsum(-1) < share * ranked.sum(-1, keepdim=True)).sum(-1, keepdim=True) + 1
    needed = needed.clamp_(min=least) if share else torch.full_like(needed, least)
    is_kept = torch.arange(mass.shape[-1], device=mass.device) < needed
    return torch.zeros_like(is_kept).scatter_(-1, place, is_kept)
