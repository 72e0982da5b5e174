"""Centroids: key blocks summarised, so that queries attend a block without reading its tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Centroids(NamedTuple):
    """One summary per key block, attended by the queries whose list leaves the block out.

    A block enters the softmax of a query q as one key with the score

        scale * q . key + log_count + scale**2 / 2 * sum_d(q_d**2 * variance_d)

    and the value `value`. The first two terms are exact where all keys of the block are equal;
    the third is the second order of the log of the mean exponential (cumulant expansion, exact
    for keys that are normally distributed within the block).

    Args:
        key: (B, H, NK, D) fp32, mean key of each block.
        value: (B, H, NK, D) fp32, mean value of each block.
        log_count: (B, H, NK) fp32, natural log of the number of keys; -inf for an empty block.
            Where heads do not differ, a view expanded over them does. A head may shift the mass
            of its summaries by adding to it.
        variance: (B, H, NK, D) fp32, variance of the keys per channel, or None for 0. A factor
            below 1 damps the third term.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor
    variance: Tensor | None = None


def listed_blocks(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """Turns block lists back into a choice of blocks.

    Args:
        indices: (..., max_count) int32; entries beyond the count may hold anything.
        counts: (...) int32.
        blocks: Number of key blocks NK.

    Returns:
        (..., NK) bool, True where the block is listed. No host synchronisation.
    """
    is_entry = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    # What is no entry goes to one surplus column, which is cut off.
    column = indices.clamp(0, blocks - 1).long().masked_fill(~is_entry, blocks)
    listed = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, column, True)[..., :blocks]
