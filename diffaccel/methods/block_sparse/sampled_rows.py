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


class _Weights(NamedTuple):
    """exp(score - peak) of rows towards all keys, and the values, of some heads; fp32."""

    peak: Tensor
    visual: Tensor
    text: Tensor
    value: Tensor
    text_value: Tensor

    def sums(self) -> _Sums:
        """What these weights sum to, over the text and over all keys."""
        text_sum, text_mass = self.text @ self.text_value, self.text.sum(-1)
        all_mass = self.visual.sum(-1) + text_mass
        exact = (self.visual @ self.value + text_sum) / all_mass[..., None]
        return _Sums(text_sum, text_mass, exact, all_mass)


class _Sums(NamedTuple):
    """Weighted values and mass of the text, exact attention and mass of all keys, of some rows."""

    text_sum: Tensor
    text_mass: Tensor
    exact: Tensor
    all_mass: Tensor


def _exact_heads(
    call: BlockCall, query: Tensor, left_out: Tensor, some: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found, length = _weights(call, query[:, some], some), call.visual.key.shape[1]
    text_sum, text_mass, exact, all_mass = found.sums()
    is_left = left_out[:, some].repeat_interleave(call.block, -1)[..., :length]
    weights = found.visual.masked_fill_(is_left, 0.0)
    kept_sum = weights @ found.value + text_sum
    return exact, found.peak, kept_sum, weights.sum(-1) + text_mass, all_mass


def _weights(call: BlockCall, query: Tensor, some: slice) -> _Weights:
    visual, text = call.visual, call.exact
    scores = query @ visual.key[:, :, some].float().permute(0, 2, 3, 1)
    text_scores = query @ text.key[:, :, some].float().permute(0, 2, 3, 1)
    if visual.valid is not None:
        scores = scores.masked_fill(~visual.valid[:, None, None], -torch.inf)
    if text.valid is not None:
        text_scores = text_scores.masked_fill(~text.valid[:, None, None], -torch.inf)
    peak = torch.cat([scores, text_scores], -1).amax(-1)
    weights = scores.sub_(peak[..., None]).exp_()
    text_weights = text_scores.sub_(peak[..., None]).exp_()
    value = _real_values(visual.value[:, :, some], visual.valid)
    text_value = _real_values(text.value[:, :, some], text.valid)
    return _Weights(peak, weights, text_weights, value, text_value)


class BlockSums(NamedTuple):
    """The exact attention of R query rows of one head, apart for each key block. fp32.

    Args:
        query: (B, 1, R, D), scaled.
        peak: (B, 1, R), what is subtracted from all scores.
        sums: (B, 1, R, NB, D), weighted sum of the values of each block.
        masses: (B, 1, R, NB), sum of these weights.
        text_sum: (B, 1, R, D), the same of the text.
        text_mass: (B, 1, R).
        exact: (B, 1, R, D), the attention over all keys.
        all_mass: (B, 1, R), sum of all weights.
    """

    query: Tensor
    peak: Tensor
    sums: Tensor
    masses: Tensor
    text_sum: Tensor
    text_mass: Tensor
    exact: Tensor
    all_mass: Tensor

    def sample(self, rows: Tensor, is_real: Tensor, kept: Tensor, some: slice) -> SampledRows:
        """The rows `some` of these, if the blocks (B, 1, R, NB) of `kept` are computed."""
        weights = kept[:, :, some].float()
        sums, masses = self.sums[:, :, some], self.masses[:, :, some]
        text_sum, text_mass = self.text_sum[:, :, some], self.text_mass[:, :, some]
        return SampledRows(
            rows[some],
            is_real[:, :, some],
            self.query[:, :, some],
            self.exact[:, :, some],
            self.peak[:, :, some],
            (weights[..., None, :] @ sums).squeeze(-2) + text_sum,
            (masses * weights).sum(-1) + text_mass,
            self.all_mass[:, :, some],
            ~kept[:, :, some],
        )


def block_sums(call: BlockCall, rows: Tensor, head: int) -> BlockSums:
    """Attends exactly with some query rows (R,) of one head, block by block."""
    some = slice(head, head + 1)
    query = call.visual.query[:, rows, some].transpose(1, 2).float() * call.visual.scale
    found = _weights(call, query, some)
    padding = call.number * call.block - found.visual.shape[-1]
    weights = torch.nn.functional.pad(found.visual, (0, padding))
    value = torch.nn.functional.pad(found.value, (0, 0, 0, padding))
    weights = weights.unflatten(-1, (call.number, call.block))  # (B, 1, R, NB, n)
    value = value.unflatten(2, (call.number, call.block))
    sums = (weights.transpose(2, 3) @ value).transpose(2, 3)
    return BlockSums(query, found.peak, sums, weights.sum(-1), *found.sums())


def _real_values(value: Tensor, valid: Tensor | None) -> Tensor:
    """(B, h, N, D) fp32; padded ones may hold NaN, which a weight of 0 would not remove."""
    value = value.float().transpose(1, 2)
    return value if valid is None else value.masked_fill(~valid[:, None, :, None], 0.0)
