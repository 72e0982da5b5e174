"""Problems to measure: one shape with random tensors, several sets of them on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffaccel.benchmarks.ops.shapes import Shape

_CACHE_BYTES = 64 << 20  # where PyTorch does not tell the size of the last-level cache
_MOST_SETS = 4
_PATCHES = 4  # grid cells along each axis of one smooth feature


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One set of tensors, visual tokens in raster order.

    Args:
        query: (1, N, H, D), unit variance.
        key: (1, N, H, D).
        value: (1, N, H, D).
        text_key: (1, T, H, D), or None where T is 0.
        text_value: (1, T, H, D), or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text_key: Tensor | None
    text_value: Tensor | None

    @property
    def all_keys(self) -> Tensor:
        """(1, T + N, H, D), text first."""
        return _joined(self.text_key, self.key)

    @property
    def all_values(self) -> Tensor:
        """(1, T + N, H, D), text first."""
        return _joined(self.text_value, self.value)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What every op of one comparison computes.

    Args:
        shape: Grid, text, heads and head dim.
        density: Share of the visual key blocks (or of the window's volume) that is attended.
        block: Tokens per block.
        sets: Equal problems with different numbers; calls take turns on them.
        seed: Of the random lists.
    """

    shape: Shape
    density: float
    block: int
    sets: tuple[Inputs, ...]
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.sets[0].query.dtype

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.sets[0].query.device


def draw_problem(
    shape: Shape, density: float, block: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Problem:
    """Draws a problem with as many sets as it takes to leave the GPU's cache; one on a CPU."""
    sets = tuple(
        draw_inputs(shape, dtype, device, seed + index)
        for index in range(_set_count(shape, dtype, torch.device(device)))
    )
    return Problem(shape, density, block, sets, seed)


def draw_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Draws tensors of unit variance whose queries and keys resemble their neighbours.

    Half of the variance of query and key is one smooth field over the grid, so that a real
    selector has something to find and its lists have the locality of real ones.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(tokens: int) -> Tensor:
        size = (1, tokens, shape.heads, shape.dim)
        return torch.randn(size, generator=generator, device=device)

    field = _smooth(shape, generator, device)
    query, key = (
        noise(shape.visual).add_(field).mul_(0.5**0.5).to(dtype).contiguous() for _ in range(2)
    )
    value = noise(shape.visual).to(dtype)
    text = (noise(shape.text).to(dtype) if shape.text else None for _ in range(2))
    return Inputs(query, key, value, *text)


def _smooth(shape: Shape, generator: torch.Generator, device: str) -> Tensor:
    """(1, N, H, D) fp32 of unit variance, equal for tokens that are close."""
    coarse = tuple(ceil(length / _PATCHES) for length in shape.grid)
    size = (1, shape.heads * shape.dim, *coarse)
    nodes = torch.randn(size, generator=generator, device=device)
    field = interpolate(nodes, size=shape.grid, mode="trilinear", align_corners=True)
    field = field / field.std(dim=(2, 3, 4), keepdim=True).clamp_min(1e-3)
    return field.flatten(2).transpose(1, 2).unflatten(2, (shape.heads, shape.dim))


def _set_count(shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 0) or _CACHE_BYTES
    size = 3 * shape.heads * shape.visual * shape.dim * dtype.itemsize
    return min(_MOST_SETS, max(2, ceil(2 * cache / size)))


def _joined(text: Tensor | None, visual: Tensor) -> Tensor:
    return visual if text is None else torch.cat([text, visual], dim=1)
