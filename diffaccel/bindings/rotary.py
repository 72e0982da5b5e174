"""What bindings share to scale rotary positions: waves of a grid, tables exchanged for a while."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, waves


def phases(places: Tensor, dim: int, theta: float, axis: Axis | None) -> Tensor:
    """Complex rotations (N, dim / 2), complex64, of positions (N,)."""
    cosine, sine = waves(places.double(), dim, theta, axis)
    return torch.complex(cosine[:, ::2].contiguous(), sine[:, ::2].contiguous())


def scaled_tables(
    tables: Sequence[Tensor],
    theta: float,
    axes: Sequence[Axis | None],
    places: Tensor | None = None,
) -> list[Tensor]:
    """Returns complex tables (positions, D / 2), one for each axis, scaled ones computed anew.

    Args:
        tables: As the model has them.
        theta: Base of the frequencies.
        axes: What happens to each axis; None for nothing.
        places: Positions of the rows (positions,); from 0 where None.
    """
    scaled = []
    for table, axis in zip(tables, axes, strict=True):
        if axis is not None:
            rows = torch.arange(len(table)) if places is None else places
            rows = rows.to(table.device)
            table = phases(rows, 2 * table.shape[1], theta, axis).to(table.dtype)
        scaled.append(table)
    return scaled


def grid_waves(
    starts: Sequence[int],
    sizes: Sequence[int],
    dims: Sequence[int],
    theta: float,
    axes: Sequence[Axis | None],
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, D) fp32 of a grid in raster order, its axes side by side.

    Args:
        starts: First position along each axis.
        sizes: Positions along each axis.
        dims: Channels of each axis.
        theta: Base of the frequencies.
        axes: What happens to each axis; None for nothing.
    """
    spans = zip(starts, sizes, strict=True)
    places = torch.cartesian_prod(*(torch.arange(a, a + n).double() for a, n in spans))
    places = places.reshape(-1, len(dims))
    tables = [
        waves(places[:, number], dim, theta, axis)
        for number, (dim, axis) in enumerate(zip(dims, axes, strict=True))
    ]
    cosine, sine = (torch.cat(parts, 1) for parts in zip(*tables, strict=True))
    return cosine, sine


def rotations(
    ids: Tensor, dims: Sequence[int], theta: float, axes: Sequence[Axis | None]
) -> Tensor:
    """Rotation matrices (B, N, D / 2, 2, 2) fp32 of positions (B, N, axes)."""
    parts = []
    for number, (dim, axis) in enumerate(zip(dims, axes, strict=True)):
        places = ids[..., number]
        cosine, sine = waves(places.flatten().double(), dim, theta, axis)
        cosine, sine = cosine[:, ::2], sine[:, ::2]
        matrix = torch.stack([cosine, -sine, sine, cosine], -1)
        parts.append(matrix.reshape(*places.shape, dim // 2, 2, 2))
    return torch.cat(parts, -3)
