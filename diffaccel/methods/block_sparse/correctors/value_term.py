"""The value term: what values within left-out blocks do as weights tilt towards a query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockCall, Chosen
from diffaccel.methods.block_sparse.correctors.base import KernelOutput
from diffaccel.methods.block_sparse.sampled_rows import SampledRows

LARGEST_GAIN = 1.5
_STEP_ELEMENTS = 1 << 27  # of block covariances that are held at a time


def add_value_term(chosen: Chosen, sample: SampledRows | None, attended: KernelOutput) -> Tensor:
    """Adds the first order of the mean value that a query sees in the blocks it leaves out.

    Within a block, E[v exp(s q . k)] / E[exp(s q . k)] is mean_v + s C q + ... with C the
    covariance of values and keys. With P the predicted attention of the query block n, over its
    left-out blocks m,

        output_i += gain * tail_i * s * (sum_m P_nm C_m / sum_m P_nm) q_i

    where tail_i is the share of the softmax of query i that went to summaries. `gain` is set per
    head by least squares on sampled rows, within 0 to 1.5. Exact where values or keys are all
    alike within blocks (it adds 0). Own design.

    Args:
        chosen: The call.
        sample: Rows whose exact attention is known; None where `chosen.fitted` has the gain.
        attended: The output of the kernel, changed in place, and its tail.

    Returns:
        The output.
    """
    call, output = chosen.call, attended.output
    heads, dim = output.shape[2:]
    dtype = output.dtype if output.dtype in (torch.float16, torch.bfloat16) else torch.float32
    weights = _weights(chosen, dtype)
    tail = attended.tail.transpose(1, 2)
    gains: list[Tensor] = []
    step = max(1, _STEP_ELEMENTS // (len(output) * call.number * dim * dim))
    if output.device.type == "cpu":
        step = 1  # stays in the cache
    for head in range(0, heads, step):
        some = slice(head, head + step)
        slopes = (weights[:, some] @ _covariances(call, some, dtype).flatten(3)).unflatten(
            3, (dim, dim)
        )
        if sample is None:
            gain: Any = (chosen.fitted or {})["gain"][:, some]
        else:
            gain = _gain(sample, slopes, attended, some, call.block)
            gains.append(gain)
        query = _in_blocks(call, call.visual.query[:, :, some]).to(dtype)  # (B, h, NB, n, D)
        added = (query @ slopes.mT).flatten(2, 3)[:, :, : output.shape[1]].float()
        added *= (gain[..., None] * tail[:, some] * call.visual.scale)[..., None]
        output[:, :, some] += added.transpose(1, 2).to(output.dtype)
    if gains and chosen.fitted is not None:
        chosen.fitted["gain"] = torch.cat(gains, 1)
    return output


def _gain(
    sample: SampledRows, slopes: Tensor, attended: KernelOutput, some: slice, block: int
) -> Tensor:
    """Finds the gain (B, h) fp32 with the least error of the sampled rows of some heads."""
    rows, is_real = sample.rows, sample.is_real[..., None]
    output = attended.output[:, rows, some].transpose(1, 2).float()
    error = (sample.exact[:, some] - output).masked_fill_(~is_real, 0.0)  # padding may hold NaN
    added = (slopes[:, :, rows // block].float() @ sample.query[:, some, :, :, None]).squeeze(-1)
    added *= attended.tail[:, rows, some].transpose(1, 2)[..., None]
    added = added.masked_fill_(~is_real, 0.0)
    gain = (error * added).sum((2, 3)) / added.square().sum((2, 3))
    return gain.nan_to_num_(nan=0.0).clamp_(0.0, LARGEST_GAIN)


def _weights(chosen: Chosen, dtype: torch.dtype) -> Tensor:
    """The predicted attention to left-out blocks, rows summing to 1 or 0: (B, H, NB, NB)."""
    parts = []
    for rows in chosen.call.rows():
        mass = rows.probability[..., :-1].masked_fill(chosen.kept(rows.rows), 0.0)
        parts.append((mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)).to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _covariances(call: BlockCall, some: slice, dtype: torch.dtype) -> Tensor:
    """Covariance of value and key within each block: (B, h, NB, D of value, D of key)."""
    key = _in_blocks(call, call.visual.key[:, :, some]).float()
    value = _in_blocks(call, call.visual.value[:, :, some]).to(dtype)
    key = key - call.statistics.key_mean[:, some, :, None]
    valid, length = call.visual.valid, call.visual.key.shape[1]
    if valid is not None or length % call.block:
        is_real = torch.arange(call.number * call.block, device=key.device) < length
        is_real = is_real.view(1, 1, call.number, call.block, 1)
        if valid is not None:
            is_real = is_real & _in_blocks(call, valid[:, :, None, None])
        key, value = key.masked_fill(~is_real, 0.0), value.masked_fill(~is_real, 0.0)
    key /= call.statistics.counts.clamp_min(1.0)[:, None, :, None, None]
    return value.mT @ key.to(dtype)


def _in_blocks(call: BlockCall, tokens: Tensor) -> Tensor:
    """(B, N, h, D) to (B, h, NB, block, D), padded with zeros."""
    tokens = tokens.transpose(1, 2)
    padding = call.number * call.block - tokens.shape[2]
    if padding:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, padding))
    return tokens.unflatten(2, (call.number, call.block))
