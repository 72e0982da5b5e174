"""The door of neighborhood attention: what its arguments must look like."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.kernels.neighborhood.windows import Axis

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PerAxis = int | Sequence[int]


def resolve_backend(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
) -> str:
    """Names the backend: the kernel on CUDA where it can, which is all but padded keys."""
    if backend not in (None, "gather", "triton"):
        raise ValueError(f"backend must be None, 'gather' or 'triton', got {backend=}; pass None")
    suits_triton = key_padding_mask is None and value.shape[-1] == key.shape[-1]
    if backend is None:
        return "triton" if query.is_cuda and suits_triton else "gather"
    if backend == "triton":
        if not suits_triton:
            raise ValueError(
                "backend 'triton' takes no key_padding_mask and one head dim for key and value; "
                "pass backend=None"
            )
        if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, got query on {query.device}; pass "
                "backend=None, or set TRITON_INTERPRET=1 before the first import to debug"
            )
    return backend


def axes_of(
    grid: tuple[int, ...],
    kernel_size: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    is_causal: bool | Sequence[bool],
    phase: PerAxis,
    is_truncated: bool | Sequence[bool],
) -> tuple[Axis, ...]:
    """Checks the window against the grid and returns it per axis."""
    columns = []
    for name, given in (
        ("kernel_size", kernel_size),
        ("stride", stride),
        ("dilation", dilation),
        ("is_causal", is_causal),
        ("phase", phase),
        ("is_truncated", is_truncated),
    ):
        per_axis = tuple(given) if isinstance(given, Sequence) else (given,) * len(grid)
        wanted = bool if name.startswith("is_") else int
        if len(per_axis) != len(grid) or not all(type(x) is wanted for x in per_axis):
            raise ValueError(
                f"{name} must be one {wanted.__name__} or one per grid axis of {grid}, got "
                f"{given!r}; the grid is what lies between the batch and the heads"
            )
        least = 0 if name == "phase" else 1
        if wanted is int and min(per_axis) < least:
            raise ValueError(f"{name} must be at least {least}, got {given!r}")
        columns.append(per_axis)
    axes = tuple(Axis(*values) for values in zip(grid, *columns, strict=True))
    for axis in axes:
        if axis.kernel * axis.dilation > axis.length and not axis.is_truncated:
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
        if axis.phase >= axis.stride:
            raise ValueError(
                f"phase must be less than stride, got {axis.phase} with stride {axis.stride}"
            )
        if axis.is_causal and axis.is_truncated:
            raise ValueError("an axis is causal or truncated, got both; causal windows end anyway")
    return axes


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
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


def check_extra(
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
        check_mask("extra_padding_mask", mask, tuple(extra_key.shape[:2]))


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"{name} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}; pass one row "
            "per sample, True = attended"
        )
