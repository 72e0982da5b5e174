"""Windows of neighborhood attention to measure with: their size, mask and pairs."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from diffaccel.benchmarks.ops.shapes import Shape
from diffaccel.kernels import reference
from diffaccel.layout import Grid


def window_for(shape: Shape, density: float) -> Grid:
    """Kernel size per axis whose volume is about `density` of the grid, equal shares per axis."""
    axes = sum(length > 1 for length in shape.grid)
    share = density ** (1 / axes)
    return tuple(max(1, round(length * share)) for length in shape.grid)


def window_mask(shape: Shape, kernel: Grid, stride: Grid) -> Callable[[Tensor], Tensor]:
    """Returns a function that gives the mask (len(rows), N) of neighborhood attention."""
    axes = [
        reference.neighborhood_mask(*axis) for axis in zip(shape.grid, kernel, stride, strict=True)
    ]

    def mask(rows: Tensor) -> Tensor:
        places = torch.unravel_index(rows.cpu(), shape.grid)
        frames, height, width = (axis[at] for axis, at in zip(axes, places, strict=True))
        box = frames[:, :, None, None] & height[:, None, :, None] & width[:, None, None, :]
        return box.flatten(1).to(rows.device)

    return mask


def window_pairs(shape: Shape, kernel: Grid) -> int:
    """Query-key pairs of all heads: every query has the same number of keys, and all text."""
    return shape.heads * shape.visual * (prod(kernel) + shape.text)
