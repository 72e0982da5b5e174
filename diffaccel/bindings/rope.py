"""Rotary position embeddings beyond the size on which a model was trained, axis by axis.

A model that is run at a larger size meets positions and distances that it has never seen. Each
scaling moves the frequencies of one axis so that it recognises them; the weights stay as they
are. Used as a context manager around a pipeline call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.bindings import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Axis:
    """How the frequencies of one axis change."""

    def rescaled(self, frequencies: Tensor) -> Tensor:
        """Maps frequencies (D / 2,) in radians per token, fastest first, to others."""
        raise NotImplementedError(f"{type(self).__name__} does not implement rescaled")

    @property
    def amplitude(self) -> float:
        """Factor on queries and keys of this axis."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Linear(Axis):
    """Position interpolation: all distances shrink by the same factor ("Extending Context Window
    of Large Language Models via Positional Interpolation", Chen et al., 2023,
    https://arxiv.org/abs/2306.15595).

    Args:
        factor: Target length over native length, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def rescaled(self, frequencies: Tensor) -> Tensor:
        """Divides all frequencies by the factor."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Ntk(Axis):
    """Neural-tangent-kernel scaling of the base: the slowest frequency is interpolated, the
    fastest left alone ("NTK-Aware Scaled RoPE", bloc97, 2023; in "YaRN", Peng et al., 2023,
    https://arxiv.org/abs/2309.00071).

    Args:
        factor: Target length over native length, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def rescaled(self, frequencies: Tensor) -> Tensor:
        """Multiplies the base by factor ** (D / (D - 2))."""
        last = max(len(frequencies) - 1, 1)
        order = torch.arange(len(frequencies), dtype=frequencies.dtype) / last
        return frequencies * self.factor ** -order.to(frequencies.device)


@dataclass(frozen=True, slots=True)
class Yarn(Axis):
    """Interpolates slow frequencies, leaves fast ones alone, and sharpens the softmax ("YaRN",
    Peng et al., 2023, https://arxiv.org/abs/2309.00071).

    Args:
        factor: Target length over native length, at least 1.
        native: Native length in tokens.
        slow: Turns over the native length up to which a frequency is interpolated.
        fast: Turns from which it is left alone. The 32 of language models lie beyond the fastest
            frequency of a picture of 64 tokens, which makes 10 turns.
    """

    factor: float
    native: int
    slow: float = 1.0
    fast: float = 8.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.native < 1 or not 0 <= self.slow < self.fast:
            raise ValueError(
                "native must be at least 1 and slow less than fast, got "
                f"native={self.native}, slow={self.slow}, fast={self.fast}"
            )

    def rescaled(self, frequencies: Tensor) -> Tensor:
        """Blends interpolated and plain frequencies by the turns that they make."""
        turns = frequencies * self.native / (2 * math.pi)
        kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    @property
    def amplitude(self) -> float:
        """1 + 0.1 ln(factor)."""
        return 1.0 + 0.1 * math.log(self.factor)


@dataclass(frozen=True, slots=True)
class Riflex(Axis):
    """Slows the one frequency whose period a longer video would repeat ("RIFLEx: A Free Lunch
    for Length Extrapolation in Video Diffusion Transformers", Zhao et al., 2025,
    https://arxiv.org/abs/2502.15894). For the frame axis alone; does nothing to a video shorter
    than that period.

    Args:
        length: Latent frames of the video.
        component: Which frequency, the fastest is 1; 6 for Wan.
    """

    length: int
    component: int = 6

    def __post_init__(self) -> None:
        if self.length < 1 or self.component < 1:
            raise ValueError(
                f"length and component must be at least 1, got length={self.length}, "
                f"component={self.component}"
            )

    def rescaled(self, frequencies: Tensor) -> Tensor:
        """Lets the frequency make 0.9 turns over the video, if it would make more than one."""
        index = self.component - 1
        if index >= len(frequencies):
            raise ValueError(
                f"component must be at most {len(frequencies)}, the frequencies of this axis, got "
                f"component={self.component}"
            )
        changed = frequencies.clone()
        if self.length > 2 * math.pi / float(frequencies[index]):
            changed[index] = 0.9 * 2 * math.pi / self.length
        return changed


@contextmanager
def scaled_rope(
    model: nn.Module,
    *,
    frames: Axis | None = None,
    height: Axis | None = None,
    width: Axis | None = None,
) -> Iterator[None]:
    """Scales the rotary position embedding of a denoiser while the context lasts.

    Args:
        model: A FLUX or Wan transformer.
        frames: What happens to the frame axis (in FLUX: the image index); None for nothing.
        height: What happens to rows.
        width: What happens to columns.

    Raises:
        UnsupportedModelError: The model embeds positions in another way.
    """
    axes = (frames, height, width)
    kind = type(model).__name__
    if kind == "WanTransformer3DModel":
        with _scaled_tables(model.rope, axes):
            yield
    elif kind == "FluxTransformer2DModel":
        with _scaled_function(model.pos_embed, axes):
            yield
    else:
        raise UnsupportedModelError(
            f"rotary positions can be scaled in FluxTransformer2DModel and WanTransformer3DModel, "
            f"got {kind}; leave them as they are"
        )


@contextmanager
def _scaled_tables(rope: nn.Module, axes: tuple[Axis | None, ...]) -> Iterator[None]:
    """Exchanges the tables of Wan, (positions, D) cosines and sines of all axes side by side."""
    before = rope.freqs_cos, rope.freqs_sin
    parts = [table.split((rope.t_dim, rope.h_dim, rope.w_dim), 1) for table in before]
    places = torch.arange(len(before[0]), dtype=torch.float64, device=before[0].device)
    scaled: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, axis in enumerate(axes):
        tables = parts[0][number], parts[1][number]
        if axis is not None:
            tables = _waves(places, tables[0].shape[1], 10_000.0, axis)
        for kept, table in zip(scaled, tables, strict=True):
            kept.append(table)
    rope.freqs_cos, rope.freqs_sin = (torch.cat(tables, 1) for tables in scaled)
    try:
        yield
    finally:
        rope.freqs_cos, rope.freqs_sin = before


@contextmanager
def _scaled_function(embedding: nn.Module, axes: tuple[Axis | None, ...]) -> Iterator[None]:
    """Exchanges the function of FLUX, from position ids (N, 3) to cosines and sines (N, D)."""

    def forward(self: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        tables = [
            _waves(ids[:, number].cpu().double(), dim, self.theta, axis)
            for number, (dim, axis) in enumerate(zip(self.axes_dim, axes, strict=True))
        ]
        return tuple(torch.cat(parts, 1).to(ids.device) for parts in zip(*tables, strict=True))

    embedding.forward = MethodType(forward, embedding)
    try:
        yield
    finally:
        del embedding.forward


def _waves(places: Tensor, dim: int, theta: float, axis: Axis | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, dim) fp32, each frequency twice, as diffusers lays them out."""
    order = torch.arange(0, dim, 2, dtype=torch.float64, device=places.device) / dim
    frequencies = 1.0 / theta**order
    amplitude = 1.0
    if axis is not None:
        frequencies, amplitude = axis.rescaled(frequencies), axis.amplitude
    angles = torch.outer(places, frequencies)
    cosine, sine = (
        (amplitude * wave).repeat_interleave(2, dim=1).float()
        for wave in (angles.cos(), angles.sin())
    )
    return cosine, sine


def _check_factor(factor: float) -> None:
    if not factor >= 1.0:
        raise ValueError(
            f"factor must be at least 1, target length over native length, got factor={factor}"
        )
