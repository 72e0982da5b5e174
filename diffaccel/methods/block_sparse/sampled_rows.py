"""Sampled query rows whose attention is known exactly: what summaries are fitted on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockCall, Chosen

_STEP_ELEMENTS = 1 << 26  # scores that are held at a time, in fp32
_GOLDEN = (5**0.5 - 1) / 2


class SampledRows(NamedTuple):
    """R query rows of every head, spread over the sequence, and their exact attention. All fp32.

    Args:
        rows: (R,) int64, positions in block order.
        is_real: (B, 1, R) bool, False for padded rows and for those without any key.
        query: (B, H, R, D), scaled.
        exact: (B, H, R, D), the attention over all keys.
        peak: (B, H, R), what is subtracted from all scores.
        kept_sum: (B, H, R, D), weighted sum of the values of the kept blocks and the text.
        kept_mass: (B, H, R), sum of these weights.
        all_mass: (B, H, R), the same of all keys.
        left_out: (B, H, R, NB) bool.
    """

    rows: Tensor
    is_real: Tensor
    query: Tensor
    exact: Tensor
    peak: Tensor
    kept_sum: Tensor
    kept_mass: Tensor
    all_mass: Tensor
    left_out: Tensor


def spread_rows(length: int, count: int, device: torch.device, offset: float = 0.0) -> Tensor:
    """Spreads rows over a sequence: (min(count, length),) int64, ascending.

    One lies in each of as many equal parts, at places that follow the golden section: at equal
    distances they would all fall on one column of a grid whose width divides the distance.

    Args:
        length: Of the sequence.
        count: How many.
        device: Where they go.
        offset: Moves each row within its part, 0 to below 1, for rows that differ from others.
    """
    count = min(count, length)
    index = torch.arange(count, dtype=torch.float64, device=device)
    within = ((index + 0.5) * _GOLDEN + offset) % 1.0
    return ((index + within) * length / count).long()


def sampled_rows(chosen: Chosen, rows: Tensor) -> SampledRows:
    """Attends exactly with some query rows (R,), some heads at a time to bound the memory."""
    call, visual = chosen.call, chosen.call.visual
    query = visual.query[:, rows].transpose(1, 2).float() * visual.scale
    left_out = ~chosen.kept(rows // call.block)
    batch, heads = query.shape[:2]
    step = max(1, _STEP_ELEMENTS // (batch * len(rows) * visual.key.shape[1]))
    parts = [
        _exact_heads(call, query, left_out, slice(head, head + step))
        for head in range(0, heads, step)
    ]
    exact, peak, kept_sum, kept_mass, all_mass = (
        torch.cat(part, 1) for part in zip(*parts, strict=True)
    )
    is_real = peak.isfinite().all(1, keepdim=True)
    if visual.valid is not None:
        is_real = is_real & visual.valid[:, None, rows]
    return SampledRows(rows, is_real, query, exact, peak, kept_sum, kept_mass, all_mass, left_out)


def _exact_heads(
    call: BlockCall, query: Tensor, left_out: Tensor, some: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    visual, text = call.visual, call.exact
    length = visual.key.shape[1]
    scores = query[:, some] @ visual.key[:, :, some].float().permute(0, 2, 3, 1)
    text_scores = query[:, some] @ text.key[:, :, some].float().permute(0, 2, 3, 1)
    if visual.valid is not None:
        scores = scores.masked_fill(~visual.valid[:, None, None], -torch.inf)
    if text.valid is not None:
        text_scores = text_scores.masked_fill(~text.valid[:, None, None], -torch.inf)
    peak = torch.cat([scores, text_scores], -1).amax(-1)
    weights = scores.sub_(peak[..., None]).exp_()
    text_weights = text_scores.sub_(peak[..., None]).exp_()
    value = _real_values(visual.value[:, :, some], visual.valid)
    text_value = _real_values(text.value[:, :, some], text.valid)
    text_sum, text_mass = text_weights @ text_value, text_weights.sum(-1)
    all_mass = weights.sum(-1) + text_mass
    exact = (weights @ value + text_sum) / all_mass[..., None]
    is_left = left_out[:, some].repeat_interleave(call.block, -1)[..., :length]
    weights = weights.masked_fill_(is_left, 0.0)
    return exact, peak, weights @ value + text_sum, weights.sum(-1) + text_mass, all_mass


def _real_values(value: Tensor, valid: Tensor | None) -> Tensor:
    """(B, h, N, D) fp32; padded ones may hold NaN, which a weight of 0 would not remove."""
    value = value.float().transpose(1, 2)
    return value if valid is None else value.masked_fill(~valid[:, None, :, None], 0.0)
