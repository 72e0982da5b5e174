"""Neighborhood attention: every query attends a window around it on a 1-D, 2-D or 3-D grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.kernels.dense import dense_attention
from diffaccel.kernels.neighborhood_gather import neighborhood_gather
from diffaccel.kernels.neighborhood_window import Axis

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PerAxis = int | Sequence[int]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes attention of each query over its window, and over extra keys (text), exactly.

    Semantics of NATTEN ("Generalized Neighborhood Attention", Hassani et al., 2025,
    https://arxiv.org/abs/2504.16922): windows at a border move inward instead of shrinking, an
    even kernel has one key more on the left, `stride` queries share the window of their middle
    one, and dilation groups are independent. A kernel as long as its axis sees the whole axis.
    Per axis `stride <= kernel_size` and `kernel_size * dilation <= length`.

    Args:
        query: (B, X, H, D), (B, X, Y, H, D) or (B, T, Y, X, H, D), fp16, bf16 or fp32, any
            strides.
        key: The same grid with G heads; H must be a multiple of G, and query head h attends
            key head h // (H / G).
        value: The same grid with G heads and any head dim E.
        kernel_size: Keys per query and axis, one number for all axes or one per axis.
        stride: Queries that share a window, per axis.
        dilation: Distance between the keys of a window, per axis.
        is_causal: Whether queries see no later key, per axis.
        scale: Factor on the scores; None for D ** -0.5.
        key_padding_mask: Bool, shaped like query without heads and head dim, True where the key
            may be attended. Padded keys and values may hold anything, NaN included.
        extra_key: (B, E, G, D), keys that every query attends beside its window.
        extra_value: The values of `extra_key`.
        extra_padding_mask: (B, E) bool, True where the extra key may be attended.
        return_lse: Whether to return the lse too.

    Returns:
        The output, shaped like query with the head dim of value, in the dtype of query. With
        `return_lse` also the natural-log normaliser of the scaled scores, shaped like query
        without its last dim, fp32. A query without any key has output 0 and lse -inf.

    Raises:
        ValueError: If a shape or window does not fit.
        TypeError: If a dtype does not fit.
    """
    _check_tokens(query, key, value)
    grid = tuple(query.shape[1:-2])
    axes = _axes(grid, kernel_size, stride, dilation, is_causal)
    _check_extra(key, value, extra_key, extra_value, extra_padding_mask)
    if scale is not None and scale < 0:
        raise ValueError(f"scale must not be negative, got {scale=}; negate the query instead")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, tuple(query.shape[:-2]))
        key_padding_mask = key_padding_mask.flatten(1)
    query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    is_plain_dense = all(axis.is_dense for axis in axes) and not return_lse
    is_plain_dense &= extra_key is None and key_padding_mask is None
    if is_plain_dense and query.shape == key.shape == value.shape:
        return dense_attention(query, key, value, scale=scale).unflatten(1, grid)
    output, lse = neighborhood_gather(
        query, key, value, axes, scale, key_padding_mask, extra_key, extra_value,
        extra_padding_mask, return_lse,
    )  # fmt: skip
    output = output.unflatten(1, grid)
    return (output, lse.unflatten(1, grid)) if return_lse else output


def _axes(
    grid: tuple[int, ...],
    kernel_size: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    is_causal: bool | Sequence[bool],
) -> tuple[Axis, ...]:
    """Checks the window against the grid and returns it per axis."""
    columns = []
    for name, given in (
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("dilation", dilation),
        ("is_causal", is_causal),
    ):
        per_axis = tuple(given) if isinstance(given, Sequence) else (given,) * len(grid)
        wanted = bool if name == "is_causal" else int
        if len(per_axis) != len(grid) or not all(type(x) is wanted for x in per_axis):
            raise ValueError(
                f"{name} must be one {wanted.__name__} or one per grid axis of {grid}, got "
                f"{given!r}; the grid is what lies between the batch and the heads"
            )
        if wanted is int and min(per_axis) < 1:
            raise ValueError(f"{name} must be at least 1, got {given!r}")
        columns.append(per_axis)
    axes = tuple(Axis(*values) for values in zip(grid, *columns, strict=True))
    for axis in axes:
        if axis.kernel * axis.dilation > axis.length:
            raise ValueError(
                "kernel_size * dilation must not exceed the axis, got "
                f"{axis.kernel} * {axis.dilation} on an axis of {axis.length}; "
                f"use a kernel_size of at most {axis.length // axis.dilation}"
            )
        if axis.stride > axis.kernel:
            raise ValueError(
                "stride must not exceed kernel_size, or queries would miss their own position, "
                f"got stride {axis.stride} with kernel_size {axis.kernel}"
            )
    return axes


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() not in (4, 5, 6) or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            "query, key and value must be (B, X, H, D), (B, X, Y, H, D) or (B, T, Y, X, H, D), "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    heads, key_heads = query.shape[-2], key.shape[-2]
    same_grid = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not same_grid or query.shape[-1] != key.shape[-1] or key_heads != value.shape[-2]:
        raise ValueError(
            "query, key and value must share batch and grid, query and key the head dim, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; text keys go into "
            "extra_key and extra_value"
        )
    if 0 in query.shape or 0 in value.shape or heads % key_heads:
        raise ValueError(
            "no dimension may be empty and the heads of query must be a multiple of those of "
            f"key, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must share one dtype of fp16, bf16 and fp32, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}; cast them to one dtype"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            "query, key and value must be on one device, got "
            f"{query.device}, {key.device}, {value.device}; move them with .to(query.device)"
        )


def _check_extra(
    key: Tensor,
    value: Tensor,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    mask: Tensor | None,
) -> None:
    if extra_key is None and extra_value is None and mask is None:
        return
    if extra_key is None or extra_value is None:
        raise ValueError(
            "extra_key and extra_value go together, and extra_padding_mask needs them, got "
            f"{extra_key is not None=}, {extra_value is not None=}; pass both or none"
        )
    for name, extra, like in (("extra_key", extra_key, key), ("extra_value", extra_value, value)):
        count = extra_key.shape[1] if extra_key.dim() == 4 else -1
        shape = (len(like), count, *like.shape[-2:])
        if tuple(extra.shape) != shape or extra.dtype != like.dtype or extra.device != like.device:
            raise ValueError(
                f"{name} must be (B, E, heads, dim) with the batch, heads, head dim, dtype and "
                f"device of {name.removeprefix('extra_')} {tuple(like.shape)} {like.dtype}, got "
                f"{tuple(extra.shape)} {extra.dtype}"
            )
    if mask is not None:
        _check_mask("extra_padding_mask", mask, tuple(extra_key.shape[:2]))


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"{name} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}; pass one row "
            "per sample, True = attended"
        )
