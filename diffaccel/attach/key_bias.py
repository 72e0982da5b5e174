"""A number added to the scores of text keys, carried by the keys themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.layout import TokenLayout

CHANNELS = 8
"""By how many channels heads grow: two are used, the others keep rows aligned for kernels."""


def split_mask(mask: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor | None] | None:
    """Returns which keys visual rows see (B, N), and what is added to the scores of keys (B, N).

    A number that all keys share cancels in the softmax, so that visual ones get 0. None for the
    second where nothing is added; None for both where visual keys differ in what is added.

    Args:
        mask: (B, N), bool or added to the scores of visual rows.
        layout: The tokens.
    """
    if mask.dtype == torch.bool:
        return mask, None
    is_open = mask > -1e4
    visual = mask[:, layout.visual_slice]
    if not (visual == visual[:, :1]).all():
        return None
    bias = (mask - visual[:, :1]).masked_fill(~is_open, 0.0)
    return is_open, bias if bias.any() else None


def folded(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tensors (B, N, H, D + CHANNELS) whose plain scores have the bias in them.

    Exact up to rounding: query gets channels of one, key the bias over the scale and what its
    rounding lost, value zeros.

    Args:
        query: (B, N, H, D).
        key: (B, N, H, D).
        value: (B, N, H, D).
        bias: (B, N), added to the scores of a key in every row.
        scale: Factor on the scores.
    """
    shape = (*key.shape[:3], CHANNELS)
    more_query, more_key, more_value = (key.new_zeros(shape) for _ in range(3))
    more_query[..., :2] = 1.0
    wanted = (bias.double() / scale).expand(key.shape[:2])
    high = wanted.to(key.dtype)
    more_key[..., 0] = high[..., None]
    more_key[..., 1] = (wanted - high.double()).to(key.dtype)[..., None]
    pairs = ((query, more_query), (key, more_key), (value, more_value))
    query, key, value = (torch.cat(pair, -1) for pair in pairs)
    return query, key, value
