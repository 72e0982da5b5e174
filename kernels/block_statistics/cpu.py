"""Block statistics in plain PyTorch, some blocks at a time."""

from functools import lru_cache

import torch
from torch import Tensor

from diffaccel.kernels.block_statistics.call import Parts, StatisticsCall


def block_statistics_cpu(call: StatisticsCall) -> Parts:
    """Computes a call that was checked.

    Returns:
        The tensors of `BlockStatistics` in its order; those not asked for have size 0.
    """
    valid = call.valid
    if call.order is not None and valid is not None:
        valid = valid.index_select(1, call.order)
    counts = _token_counts(call, valid)
    query, query_spread, query_variance = _summarize("query", call, valid, counts)
    key, key_spread, key_variance = _summarize("key", call, valid, counts)
    value, value_deviation = counts.new_empty(0), counts.new_empty(0)
    if "value_mean" in call.needs or "value_deviation" in call.needs:
        mean, _, variance = _summarize("value", call, valid, counts)
        value = mean if "value_mean" in call.needs else value
        value_deviation = variance.sum(-1).sqrt_() if variance.numel() else value_deviation
    spreads = query_spread, key_spread
    return query, key, value, *spreads, query_variance, key_variance, value_deviation, counts


def _token_counts(call: StatisticsCall, valid: Tensor | None) -> Tensor:
    tokens, block = call.query.shape[1], call.block
    blocks = -(-tokens // block)
    if valid is None:
        counts = torch.full(
            (1, blocks), float(block), dtype=torch.float32, device=call.query.device
        )
        counts[:, -1] = tokens - (blocks - 1) * block
        return counts
    padded = torch.nn.functional.pad(valid, (0, blocks * block - tokens))
    return padded.unflatten(1, (blocks, block)).sum(-1, dtype=torch.float32)


def _summarize(
    name: str, call: StatisticsCall, valid: Tensor | None, counts: Tensor
) -> list[Tensor]:
    """Means, mean absolute deviations and variances, (B, H, NB, D) fp32 each or of size 0.

    Of the tokens with this name in the call; `valid` is in the order of the runs, unlike them.
    """
    tokens: Tensor = getattr(call, name)
    needs_spread = f"{name}_spread" in call.needs
    needs_variance = f"{name}_{'deviation' if name == 'value' else 'variance'}" in call.needs
    batch, length, heads, channels = tokens.shape
    means: list[Tensor] = []
    spreads: list[Tensor] = []
    variances: list[Tensor] = []
    step = max(1, call.step_elements // (batch * call.block * heads * channels))
    for first, last, size in _runs(length, call.block, step):
        start = first * call.block
        place = slice(start, start + (last - first) * size)
        if call.order is None:
            part = tokens[:, place]
        else:
            part = tokens.index_select(1, call.order[place])
        part = part.unflatten(1, (last - first, size)).flatten(3).float()
        # (B, blocks, 1, size): a product with these weights averages, twice as fast as a sum. Laid
        # out in memory, since PyTorch multiplies an expanded one block by block.
        weights = (1.0 / counts[:, first:last].clamp_min(1.0))[..., None, None]
        if valid is None:
            weights = weights.expand(-1, -1, -1, size).contiguous()
        else:
            is_real = valid[:, place].unflatten(1, (last - first, size))
            part = part.masked_fill(~is_real[..., None], 0.0)  # may hold NaN, which 0 * x keeps
            weights = weights * is_real[:, :, None]
        mean = weights @ part
        means.append(mean)
        if needs_spread:
            spreads.append(weights @ (part - mean).abs_())
        if needs_variance:  # in terms of a token: the mean of equal ones may be rounded
            deviation = part - (part[:, :, :1] if valid is None else _first(part, is_real))
            deviation -= weights @ deviation
            variances.append(weights @ deviation.square_())
    summaries = []
    for parts in (means, spreads, variances):
        summary = torch.cat(parts, 1) if parts else counts.new_empty(0)
        if parts:
            summary = summary.reshape(batch, -1, heads, channels).transpose(1, 2).contiguous()
        summaries.append(summary)
    return summaries


def _first(part: Tensor, is_real: Tensor) -> Tensor:
    """The first real token of each block of part (B, blocks, size, C), or its first of all."""
    first = is_real.byte().argmax(-1)[..., None, None]
    return part.gather(2, first.expand(-1, -1, -1, part.shape[3]))


@lru_cache(maxsize=64)
def _runs(length: int, block: int, step: int) -> tuple[tuple[int, int, int], ...]:
    """First block, last block, tokens per block: full blocks in steps, then the tail."""
    full, tail = divmod(length, block)
    runs = [(first, min(first + step, full), block) for first in range(0, full, step)]
    return (*runs, (full, full + 1, tail)) if tail else tuple(runs)
