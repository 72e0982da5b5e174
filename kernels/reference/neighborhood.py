"""Dense fp64 oracle of neighborhood attention: its mask, pair by pair."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.kernels.reference.attention import attention


def neighborhood_mask(
    length: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    phase: int = 0,
    is_truncated: bool = False,
) -> Tensor:
    """Builds the mask of neighborhood attention along one axis, pair by pair.

    Returns:
        (length, length) bool, True where the query (row) attends the key (column).
    """
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        group, place = query % dilation, query // dilation
        size = len(range(group, length, dilation))
        shared = (place + phase) // stride * stride - phase
        if is_causal:
            leader = min(shared + stride - 1, size - 1)
            start, end = max(leader - kernel_size + 1, 0), min(place + 1, size)
        elif is_truncated:
            start = shared + stride // 2 - kernel_size // 2
            end = start + kernel_size
        else:
            leader = min(shared + stride // 2, size - 1)
            start = min(max(leader - kernel_size // 2, 0), size - kernel_size)
            end = start + kernel_size
        for key in range(length):
            mask[query, key] = key % dilation == group and start <= key // dilation < end
    return mask


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[tuple[int, int, int, bool, int, bool]],
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `diffaccel.kernels.neighborhood_attention` in fp64 with a dense mask.

    Args:
        query: (B, X1..Xn, H, D).
        key: (B, X1..Xn, H, D).
        value: (B, X1..Xn, H, E).
        axes: Kernel size, stride, dilation, causality, phase and truncation of each axis; the
            last ones may be left out.
        scale: Factor on the scores; None for D ** -0.5.
        extra_key: (B, T, H, D) or None.
        extra_value: (B, T, H, E) or None.

    Returns:
        The output (B, X1..Xn, H, E) and the lse (B, X1..Xn, H), both fp64.
    """
    grid = query.shape[1:-2]
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, axis in zip(grid, axes, strict=True):
        mask = torch.kron(mask.int(), neighborhood_mask(length, *axis).int()).bool()
    query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    if extra_key is not None and extra_value is not None:
        key, value = torch.cat([extra_key, key], dim=1), torch.cat([extra_value, value], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), extra_key.shape[1]), mask], dim=1)
    output, lse = attention(query, key, value, mask[None, None], scale)
    return output.unflatten(1, grid), lse.unflatten(1, grid)
