"""Dense fp64 oracles of attention and of merging its parts, written from their definitions.

They build the whole (B, H, N, M) score tensor and share no code with the fast paths: use them
to check, at small sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes softmax attention in fp64 from its definition.

    Args:
        query: (B, N, H, D), any float dtype.
        key: (B, M, H, D), any float dtype.
        value: (B, M, H, D), any float dtype. Keys that no query of a head attends may hold NaN.
        mask: Bool, broadcastable to (B, H, N, M), True where the key is attended.
        scale: Factor on the scores; None for D ** -0.5.

    Returns:
        The output (B, N, H, D) and the natural-log lse (B, N, H), both fp64. A row that attends
        nothing is 0 with lse -inf.
    """
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    if mask is not None:
        mask = mask.expand(scores.shape)
        scores = scores.masked_fill(~mask, -torch.inf)
        is_attended = mask.any(dim=2).transpose(1, 2).unsqueeze(-1)
        value = value.masked_fill(~is_attended, 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    is_empty = (lse == -torch.inf).unsqueeze(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(is_empty, 0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value), lse.transpose(1, 2)


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint key sets in fp64.

    Args:
        outputs: Partial results, each (B, N, H, D).
        lses: Natural-log lse of each part, (B, N, H).

    Returns:
        The merged output (B, N, H, D) and lse (B, N, H), both fp64.
    """
    stacked = torch.stack([lse.double() for lse in lses])
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse).nan_to_num(nan=0.0)
    parts = torch.stack([output.double() for output in outputs])
    return (weights.unsqueeze(-1) * parts).sum(dim=0), lse
