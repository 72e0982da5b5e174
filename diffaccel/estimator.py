"""Block statistics, and the attention between blocks that they predict.

A block mean stands for its n tokens, so its logit gets + log n: the softmax over blocks and text
tokens then has the weights that the token softmax would have if the tokens of a block were
equal. This is the reallocation of "Rectified SpaAttn" (2025, https://arxiv.org/abs/2511.19835)
in a form that is also exact for ragged and partly padded blocks. Everything is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that one step holds in fp32: on a CPU what fits a cache, else what fills the device.
_STEP_ELEMENTS_CPU = 1 << 20
_STEP_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class BlockStatistics:
    """What the estimator knows about each block of visual tokens.

    Args:
        query_mean: (B, H, NB, D) fp32, mean over the valid tokens of the block.
        key_mean: (B, H, NB, D) fp32.
        value_mean: (B, H, NB, D) fp32, or None where not asked for.
        query_spread: (B, H, NB, D) fp32, mean absolute deviation per channel, or None.
        key_spread: (B, H, NB, D) fp32, or None.
        key_variance: (B, H, NB, D) fp32, variance per channel, or None.
        counts: (B or 1, NB) fp32, valid tokens of each block; 0 for a fully padded one.
    """

    query_mean: Tensor
    key_mean: Tensor
    value_mean: Tensor | None
    query_spread: Tensor | None
    key_spread: Tensor | None
    key_variance: Tensor | None
    counts: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks NB."""
        return self.key_mean.shape[2]


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None = None,
    *,
    needs_value: bool = True,
    needs_spread: bool = True,
    needs_variance: bool = False,
) -> BlockStatistics:
    """Summarises runs of `block` tokens; the last run may be shorter.

    Args:
        query: (B, N, H, D) visual tokens in block order, any float dtype.
        key: (B, N, H, D).
        value: (B, N, H, D).
        block: Tokens per block, at least 1.
        valid: (B, N) bool, True for real tokens. Padded tokens may hold NaN.
        needs_value: Whether to compute value means.
        needs_spread: Whether to compute the deviations of query and key.
        needs_variance: Whether to compute the variance of key.
    """
    counts = _token_counts(query.shape[1], block, valid, query.device)
    query_mean, query_spread, _ = _summarize(query, block, valid, counts, needs_spread)
    key_mean, key_spread, key_variance = _summarize(
        key, block, valid, counts, needs_spread, needs_variance
    )
    value_mean = _summarize(value, block, valid, counts)[0] if needs_value else None
    return BlockStatistics(
        query_mean, key_mean, value_mean, query_spread, key_spread, key_variance, counts
    )


def block_attention(
    statistics: BlockStatistics,
    text_key: Tensor,
    text_valid: Tensor | None,
    scale: float,
    rows: slice = slice(None),
) -> Tensor:
    """Predicts how much attention each query block pays to each key block and to the text.

    Args:
        statistics: Of the visual blocks.
        text_key: (B, T, H, D) keys that every query sees exactly; T may be 0.
        text_valid: (B, T) bool or None.
        scale: Factor on the logits.
        rows: Which query blocks to compute.

    Returns:
        (B, H, rows, NB + 1) fp32. Each row sums to 1, its last entry is all text together; a
        fully padded block has 0, and a sample without any valid key has zeros everywhere.
    """
    query = statistics.query_mean[:, :, rows] * scale
    logits = query @ statistics.key_mean.transpose(-1, -2)
    logits += statistics.counts.log()[:, None, None, :]
    text_logits = query @ text_key.float().permute(0, 2, 3, 1)
    if text_valid is not None:
        text_logits.masked_fill_(~text_valid[:, None, None, :], -torch.inf)
    text_logit = text_logits.logsumexp(-1, keepdim=True)
    weights = torch.cat([logits, text_logit], dim=-1).softmax(-1)
    # Only padding can leave a row without any key.
    return weights if text_valid is None else weights.nan_to_num_(nan=0.0)


def row_steps(statistics: BlockStatistics, text_length: int) -> Iterator[slice]:
    """Splits the query blocks into runs whose block attention fits one step of work."""
    batch, heads, blocks, _ = statistics.query_mean.shape
    step = max(1, _STEP_ELEMENTS // (batch * heads * (blocks + text_length + 1)))
    return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))


def _token_counts(tokens: int, block: int, valid: Tensor | None, device: torch.device) -> Tensor:
    blocks = -(-tokens // block)
    if valid is None:
        counts = torch.full((1, blocks), float(block), device=device)
        counts[:, -1] = tokens - (blocks - 1) * block
        return counts
    padded = torch.nn.functional.pad(valid, (0, blocks * block - tokens))
    return padded.unflatten(1, (blocks, block)).sum(-1, dtype=torch.float32)


def _summarize(
    tokens: Tensor,
    block: int,
    valid: Tensor | None,
    counts: Tensor,
    needs_spread: bool = False,
    needs_variance: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Means, mean absolute deviations and variances, (B, H, NB, D) fp32 each.

    Works on some blocks at a time.
    """
    batch, length, heads, channels = tokens.shape
    means, spreads, variances = [], [], []
    limit = _STEP_ELEMENTS_CPU if tokens.device.type == "cpu" else _STEP_ELEMENTS
    step = max(1, limit // (batch * block * heads * channels))
    for first, last, size in _runs(length, block, step):
        place = slice(first * block, first * block + (last - first) * size)
        part = tokens[:, place].unflatten(1, (last - first, size)).flatten(3).float()
        # (B, blocks, 1, size): a product with these weights averages, twice as fast as a sum.
        weights = (1.0 / counts[:, first:last].clamp_min(1.0))[..., None, None]
        if valid is None:
            weights = weights.expand(-1, -1, -1, size)
        else:
            is_real = valid[:, place].unflatten(1, (last - first, size))
            part = part.masked_fill(~is_real[..., None], 0.0)  # may hold NaN, which 0 * x keeps
            weights = weights * is_real[:, :, None]
        mean = weights @ part
        means.append(mean)
        if needs_spread:
            spreads.append(weights @ (part - mean).abs_())
        if needs_variance:
            variances.append(weights @ (part - mean).square_())
    return tuple(
        torch.cat(parts, 1).reshape(batch, -1, heads, channels).transpose(1, 2).contiguous()
        if parts
        else None
        for parts in (means, spreads, variances)
    )


def _runs(length: int, block: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first block, last block, tokens per block): full blocks in steps, then the tail."""
    full, tail = divmod(length, block)
    for first in range(0, full, step):
        yield first, min(first + step, full), block
    if tail:
        yield full, full + 1, tail
