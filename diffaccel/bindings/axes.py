"""How the frequencies of a rotary position embedding change along one axis.

A model that is run at a larger size meets positions and distances that it has never seen. Each
scaling moves the frequencies of one axis so that it recognises them; the weights stay as they
are. `diffaccel.bindings.rope.scaled_rope` applies them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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


def waves(
    places: Tensor,
    dim: int,
    theta: float,
    axis: Axis | None,
    origins: Tensor | None = None,
    *,
    step: float = 1.0,
    start: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, dim) fp32, each frequency twice, as diffusers lays them out.

    Args:
        places: (N,) fp64, in tokens.
        dim: D of the axis.
        theta: Base of the frequencies.
        axis: What happens to them, None for nothing.
        origins: (N,) fp64, the places from which scaled distances are counted; None for 0.
        step: Positions from one token to the next.
        start: Position of place 0, whose angles stay as they are.
    """
    order = torch.arange(0, dim, 2, dtype=torch.float64, device=places.device) / dim
    frequencies = step / theta**order
    amplitude = 1.0 if axis is None else axis.amplitude
    found = start / step * frequencies + angles(places, frequencies, axis, origins)
    cosine, sine = (
        (amplitude * wave).repeat_interleave(2, dim=1).float()
        for wave in (found.cos(), found.sin())
    )
    return cosine, sine


def angles(
    places: Tensor, frequencies: Tensor, axis: Axis | None, origins: Tensor | None = None
) -> Tensor:
    """Angles (..., D / 2) in radians of places (...), of which only what lies beyond the origins
    (...) is scaled."""
    if axis is None:
        return places[..., None] * frequencies
    scaled = axis.rescaled(frequencies)
    if origins is None:
        return places[..., None] * scaled
    return (places - origins)[..., None] * scaled + origins[..., None] * frequencies


def on_grid(tables: list[Tensor]) -> Tensor:
    """Lays tables (frames, D1), (height, D2) and (width, D3) side by side for each token of a
    grid, (frames * height * width, D1 + D2 + D3)."""
    sizes = [len(table) for table in tables]
    spread = []
    for number, table in enumerate(tables):
        shape = [1, 1, 1, table.shape[1]]
        shape[number] = sizes[number]
        spread.append(table.view(shape).expand(*sizes, -1))
    return torch.cat(spread, -1).flatten(0, 2)


def _check_factor(factor: float) -> None:
    if not factor >= 1.0:
        raise ValueError(
            f"factor must be at least 1, target length over native length, got factor={factor}"
        )
