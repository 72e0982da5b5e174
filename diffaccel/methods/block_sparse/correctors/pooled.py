"""Left-out blocks get their predicted share of the attention, as their mean value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffaccel.kernels import BlockStatistics
from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.correctors.base import Corrector


@dataclass(frozen=True, slots=True)
class PooledReallocation(Corrector):
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
        """The mean values, and the deviations that GAPR compares."""
        spreads = {"query_spread", "key_spread"} if self.gapr else set()
        return frozenset({"value_mean", *spreads})

    def added_cost(self, length: int, block: int) -> float:
        """Weights times mean values, block by block."""
        return 1.0 / (2 * block**2)

    def correct(self, rows: BlockRows, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the scale and bias above."""
        statistics = rows.call.statistics
        weights = rows.probability[..., :-1].masked_fill(kept, 0.0)
        if self.gapr:
            weights = weights.masked_fill_(~is_gain(statistics, rows.rows), 0.0)
        scale = (1.0 - weights.sum(-1)).clamp_(0.0, 1.0)
        return scale, weights @ statistics.value_mean


def is_gain(statistics: BlockStatistics, rows: slice | Tensor = slice(None)) -> Tensor:
    """The GAPR test: (B, H, rows, NB) bool, strict, on raw logits (the scale cancels)."""
    query = statistics.query_mean[:, :, rows]
    query_spread = statistics.query_spread[:, :, rows]
    key = statistics.key_mean.transpose(-1, -2)
    key_spread = statistics.key_spread.transpose(-1, -2)
    error = (query_spread @ key).abs_() + (query @ key_spread).abs_()
    return (query @ key).abs_() > error
