"""Neighborhood attention: every query attends a window around it on a 1-D, 2-D or 3-D grid."""

from collections.abc import Sequence
from math import ceil, prod
from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffaccel.kernels.arguments import Numbers, Tensors, refuse_backward
from diffaccel.kernels.dense import dense_attention
from diffaccel.kernels.neighborhood.call import (
    NeighborhoodCall,
    PerAxis,
    axes_of,
    check,
    check_grids,
)
from diffaccel.kernels.neighborhood.cpu import neighborhood_gather
from diffaccel.kernels.neighborhood.windows import Axis, seen_share, tile_sizes, visited_along


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    phase: PerAxis = 0,
    is_truncated: bool | Sequence[bool] = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: Literal["gather", "triton"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes attention of each query over its window, and over extra keys (text), exactly.

    Semantics of NATTEN ("Generalized Neighborhood Attention", Hassani et al., 2025,
    https://arxiv.org/abs/2504.16922): windows at a border move inward instead of shrinking, an
    even kernel has one key more on the left, `stride` queries share the window of their middle
    one, and dilation groups are independent. A kernel as long as its axis sees the whole axis.
    Per axis `stride <= kernel_size` and `kernel_size * dilation <= length`. `phase` and
    `is_truncated` go beyond NATTEN: with stride = kernel_size, phase = kernel_size // 2 and
    truncation, windows are those of a shifted Swin layer.

    Args:
        query: (B, X, H, D), (B, X, Y, H, D) or (B, T, Y, X, H, D), fp16, bf16, fp32 or
            fp64, any strides. fp64 is computed in fp64, by gathering.
        key: The same grid with G heads; H must be a multiple of G, and query head h attends
            key head h // (H / G).
        value: The same grid with G heads and any head dim E.
        kernel_size: Keys per query and axis, one number for all axes or one per axis.
        stride: Queries that share a window, per axis.
        dilation: Distance between the keys of a window, per axis.
        is_causal: Whether queries see no later key, per axis.
        phase: Queries by which the first run of `stride` is shorter, 0 to stride - 1, per axis.
        is_truncated: Whether windows are cut off at the ends of an axis instead of moving
            inward, per axis; the kernel may then be longer than the axis.
        scale: Factor on the scores; None for D ** -0.5.
        key_padding_mask: Bool, shaped like query without heads and head dim, True where the key
            may be attended. Padded keys and values may hold anything, NaN included.
        extra_key: (B, E, G, D), keys that every query attends beside its window.
        extra_value: The values of `extra_key`.
        extra_padding_mask: (B, E) bool, True where the extra key may be attended.
        return_lse: Whether to return the lse too.
        backend: "gather" (plain PyTorch, any device), "triton", or None for the one that fits.

    Returns:
        The output, shaped like query with the head dim of value, in the dtype of query. With
        `return_lse` also the natural-log normaliser of the scaled scores, shaped like query
        without its last dim, fp32. A query without any key has output 0 and lse -inf.

    Raises:
        ValueError: If a shape or window does not fit.
        TypeError: If a dtype does not fit.
    """
    check_grids(query, key, value)
    grid = tuple(query.shape[1:-2])
    axes = axes_of(grid, kernel_size, stride, dilation, is_causal, phase, is_truncated)
    call = NeighborhoodCall(
        query, key, value, axes, scale, key_padding_mask, extra_key, extra_value,
        extra_padding_mask, return_lse, backend,
    )  # fmt: skip
    check(call)
    output, lse = attend(call)
    return (output, lse) if return_lse else output


def attend(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Runs a call whose arguments are known to fit: `neighborhood_attention` without its checks.

    Returns:
        The output, and the lse, which has size 0 unless the call asks for it.
    """
    query, key, value = call.query, call.key, call.value
    if call.is_plain_dense and not call.return_lse:
        tokens = (x.flatten(1, -3) for x in (query, key, value))
        output = dense_attention(*tokens, scale=call.scale)
        no_lse = query.new_empty(0, dtype=torch.float32)
        return output.unflatten(1, tuple(query.shape[1:-2])), no_lse
    windows = []
    for axis in call.axes:
        windows += [axis.kernel, axis.stride, axis.dilation, int(axis.is_causal)]
        windows += [axis.phase, int(axis.is_truncated)]
    rest = [key, value, call.key_padding_mask, call.extra_key, call.extra_value]
    rest += [call.extra_padding_mask]
    scale, backend = float(call.factor), call.backend or ""
    return _neighborhood_attention(query, rest, windows, scale, call.return_lse, backend)


def visited_share(axes: Sequence[Axis], query: Tensor) -> tuple[float, float]:
    """Says what `neighborhood_attention` computes, masked pairs included.

    Args:
        axes: The window.
        query: (B, N, H, D) or with the grid, for its device, dtype and head dim.

    Returns:
        Share of all pairs that the backend for the device visits, and that which it would visit
        if its tiles fitted the windows.
    """
    if not query.is_cuda or query.dtype == torch.float64:
        sizes = tile_sizes(tuple(axes))
        visited = prod(
            visited_along(axis, size, 1) for axis, size in zip(axes, sizes, strict=True)
        )
        return visited, prod(map(seen_share, axes))
    from diffaccel.kernels.block_sparse.tiles import device_capability
    from diffaccel.kernels.neighborhood.launch import box_config

    capability = device_capability(query.device)
    config = box_config(tuple(axes), query.shape[-1], query.element_size(), capability)
    boxes = list(zip(axes, config.query, config.key, strict=True))
    visited = prod(visited_along(axis, queries, keys) for axis, queries, keys in boxes)
    return visited, prod(
        min(1.0, ceil(axis.kernel / keys) * keys / axis.length) for axis, _, keys in boxes
    )


@torch.library.custom_op("diffaccel::neighborhood_attention", mutates_args=())
def _neighborhood_attention(
    query: Tensor, rest: Tensors, windows: Numbers, scale: float, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Packs the call again, and runs its backend; the windows hold six numbers per axis."""
    axes = []
    for place, length in enumerate(query.shape[1:-2]):
        size, stride, dilation, causal, phase, truncated = windows[6 * place : 6 * place + 6]
        axes.append(Axis(length, size, stride, dilation, bool(causal), phase, bool(truncated)))
    key, value, *optional = rest
    fields = (query, key, value, tuple(axes), scale, *optional, return_lse)
    call = NeighborhoodCall(*cast(Any, fields))
    if backend == "triton" or (not backend and query.is_cuda and call.suits_triton):
        from diffaccel.kernels.neighborhood.launch import neighborhood_triton

        return neighborhood_triton(call)
    return neighborhood_gather(call)


@_neighborhood_attention.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    (_, value, *_), _, _, return_lse, _ = arguments
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse_shape = query.shape[:-1] if return_lse else (0,)
    return output, query.new_empty(lse_shape, dtype=torch.float32)


_neighborhood_attention.register_autograd(refuse_backward("neighborhood_attention"))
