"""Correctors: what is done about the key blocks that a selector left out.

A softmax over kept blocks alone gives them all of the attention, although they own a part of it,
and gives the others nothing. A corrector answers in one of two ways: with two numbers per query
block, which the attention kernel applies to every row of it (`output = row_scale * exact +
row_bias`), or with one summary per key block, which the kernel puts into the softmax of every
row that leaves the block out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import BlockStatistics, Centroids, listed_blocks
from diffaccel.methods.inputs import ExactTokens, VisualTokens


class Selected(NamedTuple):
    """The tokens of a call in block order, and what a selector chose.

    Args:
        visual: The visual tokens.
        exact: What every query sees exactly.
        indices: (B, H, NB, max_count) int32 kept key blocks per query block.
        counts: (B, H, NB) int32.
        block: Tokens per block.
    """

    visual: VisualTokens
    exact: ExactTokens
    indices: Tensor
    counts: Tensor
    block: int


@dataclass(frozen=True, slots=True)
class NoCorrection:
    """Left-out blocks count as if they did not exist. The base of all correctors."""

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of `BlockStatistics` that are used."""
        return frozenset()

    def correct(
        self, statistics: BlockStatistics, probability: Tensor, kept: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor] | None:
        """Computes what is applied to every row of a query block, or None for nothing.

        Args:
            statistics: Of all blocks.
            probability: (B, H, R, NB + 1) fp32, the rows of the block attention.
            kept: (B, H, R, NB) bool, from the selector.
            rows: Which query blocks these are.

        Returns:
            row_scale (B, H, R) fp32 in 0..1, and row_bias (B, H, R, D) fp32.
        """
        return None

    def centroids(self, statistics: BlockStatistics, selected: Selected) -> Centroids | None:
        """Summarises the key blocks for the softmax of each row, or None for nothing."""
        return None


@dataclass(frozen=True, slots=True)
class PooledReallocation(NoCorrection):
    """Gives left-out blocks their predicted share of the attention, as their mean value.

    With P the predicted block attention and A the set of left-out blocks that are trusted:

        W = P over A, 0 elsewhere          row_bias  = W @ value_mean
        R = 1 - sum(W)                     row_scale = R

    so the weights of a row still sum to 1 and a constant value stays constant. The mass of
    left-out blocks that are not trusted goes back to the exact part, as the text does. This is
    IPAR ("isolated-pooling attention reallocation") of "Rectified SpaAttn" (2025,
    https://arxiv.org/abs/2511.19835), in the form of the authors' code; the paper's formula has
    R over the kept blocks only, whose output would shrink where blocks are rejected.

    Args:
        gapr: Trusts a left-out block only where pooling gains more than it errs (GAPR,
            "gain-aware pooling rectification"):
            |q.k| > |spread_q.k| + |q.spread_k| over block means q, k. False trusts all.
            The test is a heuristic, no bound, and unlike attention itself it changes when one
            vector is added to all keys; keys are not smoothed here.
    """

    gapr: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """Means of the values, and for GAPR the deviations of query and key."""
        return frozenset({"value_mean", *(("query_spread", "key_spread") if self.gapr else ())})

    def correct(
        self, statistics: BlockStatistics, probability: Tensor, kept: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Computes the scale and bias above."""
        weights = probability[..., :-1].masked_fill(kept, 0.0)
        if self.gapr:
            weights = weights.masked_fill_(~is_gain(statistics, rows), 0.0)
        scale = (1.0 - weights.sum(-1)).clamp_(0.0, 1.0)
        return scale, weights @ statistics.value_mean


def is_gain(statistics: BlockStatistics, rows: slice = slice(None)) -> Tensor:
    """The GAPR test: (B, H, rows, NB) bool, strict, on raw logits (the scale cancels)."""
    query = statistics.query_mean[:, :, rows]
    query_spread = statistics.query_spread[:, :, rows]
    key = statistics.key_mean.transpose(-1, -2)
    key_spread = statistics.key_spread.transpose(-1, -2)
    error = (query_spread @ key).abs_() + (query @ key_spread).abs_()
    return (query @ key).abs_() > error


CALIBRATION_ROWS = 32  # query rows per head whose attention over all keys is computed
LARGEST_DAMPING = 2.0  # of the variance term; 1 is the undamped second order
BISECTIONS = 12


@dataclass(frozen=True, slots=True)
class CalibratedCentroids(NoCorrection):
    """Lets every query weigh the left-out blocks itself, by their mean key and its variance.

    A left-out block m of n_m keys enters the softmax of query q as one key with

        score  scale * q . mean_m + log n_m + damping * scale**2 / 2 * sum_d(q_d**2 * var_md)
        value  mean value of the block

    that is, the cumulant expansion of the block's share of the attention up to second order. At
    full strength the second order overshoots where keys are far from normally distributed, and
    without it left-out blocks get too little. So `damping` is set per head such that 32 query
    rows, spread over the sequence, have the right normaliser on average; their attention over
    all keys is computed for it, which costs 32 of N rows. Blocks whose keys and values are all
    equal are exact. Rows, unlike query blocks, have no borders, so that pictures have none.

    Own design. Per-row block means in the softmax are also the approach of "PISA" (2026,
    https://arxiv.org/abs/2602.01077), with another first-order term and no second.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Means of the values, and the variance of the keys."""
        return frozenset({"value_mean", "key_variance"})

    def centroids(self, statistics: BlockStatistics, selected: Selected) -> Centroids:
        """Summarises the key blocks; `variance` is damped already."""
        damping = calibrated_damping(statistics, selected)
        return Centroids(
            statistics.key_mean,
            statistics.value_mean,
            statistics.counts.log().unsqueeze(1).expand(*damping.shape, -1),
            statistics.key_variance * damping[:, :, None, None],
        )


def calibrated_damping(statistics: BlockStatistics, selected: Selected) -> Tensor:
    """Finds the factor on the variance term that gives sampled rows the right normaliser.

    Returns:
        (B, H) fp32, 0 to `LARGEST_DAMPING`.
    """
    visual, exact_tokens, block = selected.visual, selected.exact, selected.block
    length, device = visual.query.shape[1], visual.query.device
    count = min(CALIBRATION_ROWS, length)
    rows = (
        (torch.arange(count, dtype=torch.float32, device=device) + 0.5) * length / count
    ).long()
    query = visual.query[:, rows].transpose(1, 2).float() * visual.scale
    lists = selected.indices[:, :, rows // block], selected.counts[:, :, rows // block]
    left_out = ~listed_blocks(*lists, statistics.blocks)
    text = query @ exact_tokens.key.permute(0, 2, 3, 1).float()
    if exact_tokens.valid is not None:
        text = text.masked_fill(~exact_tokens.valid[:, None, None], -torch.inf)
    text = text.logsumexp(-1)
    masses = _block_masses(query, visual, block)
    exact = torch.logaddexp(masses.logsumexp(-1), text)
    kept = torch.logaddexp(masses.masked_fill(left_out, -torch.inf).logsumexp(-1), text)

    first = query @ statistics.key_mean.mT + statistics.counts.log()[:, None, None]
    first = first.masked_fill(~left_out, -torch.inf)
    second = (query.square() * 0.5) @ statistics.key_variance.mT
    low = query.new_zeros(query.shape[:2])
    high = torch.full_like(low, LARGEST_DAMPING)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        estimate = (first + middle[..., None, None] * second).logsumexp(-1)
        excess = torch.logaddexp(kept, estimate) - exact
        is_row = excess.isfinite()
        if visual.valid is not None:  # padded rows, and rows without any key, mean nothing
            is_row &= visual.valid[:, None, rows]
        excess = excess.masked_fill(~is_row, 0.0)
        is_high = excess.mean(-1) > 0
        low, high = torch.where(is_high, low, middle), torch.where(is_high, middle, high)
    return (low + high) / 2


def _block_masses(query: Tensor, visual: VisualTokens, block: int) -> Tensor:
    """Log of the summed exponentials of each key block: (B, H, R, NB) from scaled queries."""
    length = visual.key.shape[1]
    masses = []
    for head in range(query.shape[1]):  # one at a time, since R x N scores each
        scores = query[:, head] @ visual.key[:, :, head].mT.float()
        if visual.valid is not None:
            scores = scores.masked_fill(~visual.valid[:, None], -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, -length % block), value=-torch.inf)
        masses.append(scores.unflatten(-1, (-1, block)).logsumexp(-1))
    return torch.stack(masses, 1)
