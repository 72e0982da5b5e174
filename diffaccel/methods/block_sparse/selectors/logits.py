"""How raw logits of block means become scores: at least 0, and in the same order."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.estimator import block_logits

LEAST = 1e-37  # a block with tokens is worth more than nothing, also where a softmax underflows


def mean_logits(rows: BlockRows) -> Tensor:
    """Products of mean queries and mean keys, unscaled: (B, H, R, NB) fp32."""
    return rows.query_mean @ rows.call.statistics.key_mean.mT


def in_score_order(logits: Tensor, rows: BlockRows) -> Tensor:
    """Maps logits (B, H, R, NB) of any sign to scores above 0 that rise with them.

    x becomes 1 + x above 0 and 1 / (1 - x) below: comparable across rows, and no softmax that
    would underflow. Blocks without tokens get 0, logits that are not finite NaN.
    """
    return without_empty(rising(logits), rows)


def rising(logits: Tensor) -> Tensor:
    """`in_score_order` where all blocks have tokens."""
    scores = torch.where(logits > 0, 1.0 + logits, 1.0 / (1.0 - logits.clamp(max=0.0)))
    return scores.masked_fill_(~logits.isfinite(), torch.nan)


def visual_attention(rows: BlockRows, excluded: Tensor | None = None) -> Tensor:
    """The predicted attention among visual blocks alone, which sums to 1 over each row.

    Args:
        rows: The query blocks.
        excluded: Broadcastable to (B, H, R, NB) bool, True for blocks that take no part.

    Returns:
        (B, H, R, NB) fp32; 0 for blocks without tokens and for excluded ones.
    """
    call = rows.call
    logits = block_logits(call.statistics, rows.query_mean * call.visual.scale)
    return softmax_scores(logits, rows, excluded)


def softmax_scores(logits: Tensor, rows: BlockRows, excluded: Tensor | None = None) -> Tensor:
    """Softmax of logits (B, H, R, NB) over blocks, above 0 for all that take part."""
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    scores = logits.softmax(-1).nan_to_num_(nan=0.0).clamp_min_(LEAST)
    if excluded is not None:
        scores.masked_fill_(excluded, 0.0)
    return without_empty(scores, rows)


def without_empty(scores: Tensor, rows: BlockRows) -> Tensor:
    """Gives blocks without tokens, of (B, H, R, NB), the score 0, in place."""
    return scores.masked_fill_(rows.call.statistics.counts[:, None, None] == 0, 0.0)
