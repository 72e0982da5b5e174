"""Block statistics in plain PyTorch, some blocks at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor


def block_statistics_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None,
    order: Tensor | None,
    *,
    needs_value: bool,
    needs_spread: bool,
    needs_variance: bool,
    step_elements: int,
) -> tuple[Tensor, ...]:
    """Computes `diffaccel.kernels.block_statistics`, whose arguments these are, checked.

    Returns:
        The seven tensors of `BlockStatistics` in its order; those not asked for have size 0.
    """
    if order is not None and valid is not None:
        valid = valid.index_select(1, order)
    counts = _token_counts(query.shape[1], block, valid, query.device)
    shared = {
        "block": block,
        "valid": valid,
        "order": order,
        "counts": counts,
        "step_elements": step_elements,
    }
    query_mean, query_spread, _ = _summarize(query, **shared, needs_spread=needs_spread)
    key_mean, key_spread, key_variance = _summarize(
        key, **shared, needs_spread=needs_spread, needs_variance=needs_variance
    )
    value_mean = _summarize(value, **shared)[0] if needs_value else counts.new_empty(0)
    return query_mean, key_mean, value_mean, query_spread, key_spread, key_variance, counts


def check_order(order: Tensor) -> None:
    """Raises ValueError unless order (N,) is a permutation of 0 to N - 1."""
    expected = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort().values, expected):
        raise ValueError(
            f"order must hold each of 0 to {len(order) - 1} once, got {int(order.min())} to "
            f"{int(order.max())} with gaps or repeats; pass a permutation of the tokens"
        )


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
    order: Tensor | None,
    counts: Tensor,
    step_elements: int,
    needs_spread: bool = False,
    needs_variance: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, mean absolute deviations and variances, (B, H, NB, D) fp32 each or of size 0.

    `valid` is in the order of the runs, unlike `tokens`.
    """
    batch, length, heads, channels = tokens.shape
    means, spreads, variances = [], [], []
    step = max(1, step_elements // (batch * block * heads * channels))
    for first, last, size in _runs(length, block, step):
        place = slice(first * block, first * block + (last - first) * size)
        part = tokens[:, place] if order is None else tokens.index_select(1, order[place])
        part = part.unflatten(1, (last - first, size)).flatten(3).float()
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
        else counts.new_empty(0)
        for parts in (means, spreads, variances)
    )


def _runs(length: int, block: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first block, last block, tokens per block): full blocks in steps, then the tail."""
    full, tail = divmod(length, block)
    for first in range(0, full, step):
        yield first, min(first + step, full), block
    if tail:
        yield full, full + 1, tail
