"""Structured synthetic heads: what attention is known to look like, without a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffaccel.benchmarks.studies.block_sparse.captures import Captured
from diffaccel.layout import Grid, TokenLayout

GRID = (6, 24, 24)
PATCH = (2, 4, 4)
HEADS, DIM = 4, 64
SINKS = 8
KINDS = ("alike", "sinks", "diagonal", "stripes", "mixed")
"""Tokens of a patch alike; few keys that all attend to; near tokens; the same place in all
frames; and a head of each."""


def synthetic(kind: str, seed: int, grid: Grid = GRID) -> Captured:
    """Makes query, key and value of one call, without text.

    Args:
        kind: One of `KINDS`.
        seed: Of everything drawn.
        grid: Tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = KINDS[:HEADS] if kind == "mixed" else (kind,) * HEADS
    heads = [_head(each, grid, generator) for each in kinds]
    query, key, value = (torch.stack(x, 1)[None] for x in zip(*heads, strict=True))
    layout = TokenLayout.video(*grid)
    return Captured(f"{kind}-{seed}", 0, 0, query, key, value, layout, DIM**-0.5)


def _head(kind: str, grid: Grid, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (N, D) each: structure and noise."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).float()
    length = len(places)

    def noise(strength: float, *shape: int) -> Tensor:
        return strength * torch.randn(*(shape or (length, DIM)), generator=generator)

    smooth = _waves(places, (2.0, 6.0, 6.0), generator)
    value = smooth + noise(0.5)
    if kind == "alike":
        sides = torch.tensor(PATCH)
        patches = (places // sides) @ torch.tensor([10000.0, 100.0, 1.0])
        number = patches.unique(return_inverse=True)[1]
        centres = noise(1.2, int(number.max()) + 1, DIM)
        query, key = centres[number] + noise(0.4), centres[number] + noise(0.4)
        return query, key, value + noise(1.0, int(number.max()) + 1, DIM)[number]
    if kind == "sinks":
        direction = noise(1.0, DIM)
        query, key = noise(0.6) + direction, noise(0.6) + 0.5 * smooth
        sinks = torch.randperm(length, generator=generator)[:SINKS]
        key[sinks] += 0.7 * direction
        return query, key, value
    reach = (1.5, 2.0, 2.0) if kind == "diagonal" else (math.inf, 1.2, 1.2)
    position = _waves(places, reach, generator)
    return 1.6 * position + noise(0.3), 1.6 * position + noise(0.3), value


def _waves(
    places: Tensor, reach: tuple[float, float, float], generator: torch.Generator
) -> Tensor:
    """Random waves (N, D) of variance 1, alike where places are nearer than `reach` tokens."""
    frequency = torch.randn(3, DIM, generator=generator) / torch.tensor(reach)[:, None]
    phase = 2 * math.pi * torch.rand(DIM, generator=generator)
    return math.sqrt(2.0) * torch.cos(places @ frequency + phase)
