"""Correctors: what is done about the key blocks that a selector left out.

A softmax over kept blocks alone gives them all of the attention, although they own a part of it,
and gives the others nothing. Both correctors answer with two numbers per query block, which the
attention kernel applies to every row of it: `output = row_scale * exact + row_bias`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffaccel.estimator import BlockStatistics


@dataclass(frozen=True, slots=True)
class NoCorrection:
    """Left-out blocks count as if they did not exist."""

    needs_value: ClassVar[bool] = False
    needs_spread: ClassVar[bool] = False

    def correct(
        self, statistics: BlockStatistics, probability: Tensor, kept: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor] | None:
        """Returns None: no scale, no bias."""
        return None


@dataclass(frozen=True, slots=True)
class PooledReallocation:
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
    needs_value: ClassVar[bool] = True

    @property
    def needs_spread(self) -> bool:
        """Whether the deviations of query and key are used."""
        return self.gapr

    def correct(
        self, statistics: BlockStatistics, probability: Tensor, kept: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Computes scale and bias.

        Args:
            statistics: Of all blocks.
            probability: (B, H, R, NB + 1) fp32, the rows of the block attention.
            kept: (B, H, R, NB) bool, from the selector.
            rows: Which query blocks these are.

        Returns:
            row_scale (B, H, R) fp32 in 0..1, and row_bias (B, H, R, D) fp32.
        """
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
