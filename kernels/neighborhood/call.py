"""One call of neighborhood attention: its arguments, and what they must look like."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.kernels.arguments import MASK, check_extra, check_tensor, check_tokens
from diffaccel.kernels.backends import check_backend
from diffaccel.kernels.neighborhood.windows import Axis

PerAxis = int | Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class NeighborhoodCall:
    """The arguments of `diffaccel.kernels.neighborhood_attention`, which says what they mean.

    The window is given per axis of the grid, as `axes_of` returns it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    axes: tuple[Axis, ...]
    scale: float | None = None
    key_padding_mask: Tensor | None = None
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None
    extra_padding_mask: Tensor | None = None
    return_lse: bool = False
    backend: str | None = None

    @property
    def factor(self) -> float:
        """Factor on the scores."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def suits_triton(self) -> bool:
        """Whether the Triton kernel computes it, which is all but padded keys and fp64."""
        if self.key_padding_mask is not None or self.query.dtype == torch.float64:
            return False
        return self.value.shape[-1] == self.key.shape[-1]

    @property
    def is_plain_dense(self) -> bool:
        """Whether it is dense attention over the grid alone."""
        if self.extra_key is not None or self.key_padding_mask is not None:
            return False
        is_square = self.query.shape == self.key.shape == self.value.shape
        return is_square and all(axis.is_dense for axis in self.axes)


def check(call: NeighborhoodCall) -> None:
    """Checks everything that needs no tensor value, and that `axes_of` has not checked.

    Raises:
        ValueError: If a shape or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    query, key, value = call.query, call.key, call.value
    if call.scale is not None and call.scale < 0:
        raise ValueError(
            f"scale must not be negative, got scale={call.scale}; negate the query instead"
        )
    check_tensor(
        "key_padding_mask", call.key_padding_mask, torch.bool, tuple(query.shape[:-2]), MASK
    )
    check_extra(key, value, call.extra_key, call.extra_value, call.extra_padding_mask)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": call.key_padding_mask,
        "extra_key": call.extra_key,
        "extra_value": call.extra_value,
        "extra_padding_mask": call.extra_padding_mask,
    }
    check_backend(call.backend, tensors, plain="gather")
    if call.backend == "triton" and not call.suits_triton:
        raise ValueError(
            "backend 'triton' takes no key_padding_mask, no fp64, and one head dim for key and "
            "value; pass backend=None"
        )


def check_grids(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError or TypeError unless tokens have one grid of one to three axes."""
    fits = query.dim() in (4, 5, 6) and query.dim() == key.dim() == value.dim()
    if fits:
        heads, key_heads = query.shape[-2], key.shape[-2]
        fits = query.shape[:-2] == key.shape[:-2] and key.shape[:-1] == value.shape[:-1]
        fits &= query.shape[-1] == key.shape[-1] and heads % max(1, key_heads) == 0
    check_tokens(
        "neighborhood_attention",
        query,
        key,
        value,
        fits=fits,
        rule="query, key and value must be (B, X, H, D), (B, X, Y, H, D) or (B, T, Y, X, H, D), "
        "share batch and grid, query and key the head dim, and the heads of query must be a "
        "multiple of those of key and value",
        remedy="text keys go into extra_key and extra_value",
    )


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
