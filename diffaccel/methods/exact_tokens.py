"""Text and condition tokens of a sequence: methods attend them, and from them, exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout


class OtherKeys(NamedTuple):
    """Text and condition tokens (T of them), which every query sees exactly."""

    key: Tensor
    value: Tensor
    valid: Tensor | None


def total_density(kept: float, layout: TokenLayout) -> float:
    """Share of all query-key pairs, if this share of the visual pairs is computed."""
    return 1.0 - (1.0 - kept) * (layout.visual.length / layout.length) ** 2


def other_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    scale: float | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Attends text and condition queries densely over everything.

    Returns:
        (B, N, H, D) whose visual rows are not written yet.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for part in layout.other_slices:
        output[:, part] = dense_attention(
            query[:, part], key, value, scale=scale, key_padding_mask=key_padding_mask
        )
    return output


def other_keys(
    key: Tensor, value: Tensor, key_padding_mask: Tensor | None, layout: TokenLayout
) -> OtherKeys:
    """Collects the tokens of a sequence that are not visual."""

    def collect(tokens: Tensor) -> Tensor:
        parts = [tokens[:, part] for part in layout.other_slices]
        return torch.cat(parts, 1) if parts else tokens[:, :0]

    valid = None if key_padding_mask is None else collect(key_padding_mask)
    return OtherKeys(collect(key), collect(value), valid)
