"""What all methods of windows on the token grid share: they say where the window lies, no more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from diffaccel.kernels import (
    WindowAxis,
    gathered_share,
    neighborhood_attention,
    seen_share,
    visited_share,
)
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import Visited
from diffaccel.methods.inputs import AttentionInputs, Position
from diffaccel.methods.visual import COMPUTED_DENSELY, VisualMethod, total_density

GATHERED_RATE = 0.65
"""FLOP rate of gathered tiles, the way of every device but CUDA, in terms of dense attention: 0.56
to 0.79 at 16k and 65k tokens on a CPU (2 AVX2 cores, fp32)."""

KEPT_RATE = 0.6
"""The same inside the windows on CUDA: what published kernels reach, not measured here."""

Extent = int | tuple[int, int] | tuple[int, int, int]
"""One number for height and width, (height, width), or (frames, height, width)."""


@dataclass(frozen=True, slots=True, repr=False)
class WindowMethod(VisualMethod):
    """Visual queries attend the visual tokens in a window of the grid, and all others, exactly.

    Text and condition queries run dense over everything. A subclass says what the window is.
    """

    def axes(self, layout: TokenLayout, layer: int | None = None) -> tuple[WindowAxis, ...]:
        """The window on the grid of a layout: frames, height, width."""
        raise NotImplementedError(f"{type(self).__name__} does not implement axes")

    def temperature(self, layout: TokenLayout) -> float:
        """Factor on the scores of visual queries."""
        return 1.0

    def shape_reason(self, layout: TokenLayout) -> str:
        if layout.grid is None:
            return COMPUTED_DENSELY
        is_plain = self.temperature(layout) == 1.0
        return COMPUTED_DENSELY if is_plain and self._sees_everything(layout) else ""

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Pairs that are computed over the rate on them."""
        if self.shape_reason(layout):
            return None
        if device == "cuda":
            return self.expected_density(layout) / KEPT_RATE
        return total_density(gathered_share(self.axes(layout)), layout) / GATHERED_RATE

    def expected_density(self, layout: TokenLayout) -> float:
        """Share of the pairs that windows let through, exactly."""
        if self.shape_reason(layout):
            return 1.0
        return total_density(prod(map(seen_share, self.axes(layout))), layout)

    def visited(
        self, layout: TokenLayout, query: Tensor, layer: int | None = None
    ) -> Visited | None:
        """What the kernel on the device of a query computes, masked pairs included."""
        if self.shape_reason(layout):
            return None
        visited, ideal = visited_share(self.axes(layout, layer), query)
        return Visited(total_density(visited, layout), total_density(ideal, layout))

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> float:
        layout, scale = inputs.layout, inputs.scale * self.temperature(inputs.layout)
        if self._sees_everything(layout):
            out.copy_(replace(inputs, scale=scale).dense_rows(layout.visual_slice))
            return 1.0
        axes, visual, grid = self.axes(layout, position.layer), inputs.visual(), layout.grid
        query, key, value = (
            x.unflatten(1, grid) for x in (visual.query, visual.key, visual.value)
        )
        result: Any = neighborhood_attention(
            query,
            key,
            value,
            [axis.kernel for axis in axes],
            stride=[axis.stride for axis in axes],
            dilation=[axis.dilation for axis in axes],
            is_causal=[axis.is_causal for axis in axes],
            phase=[axis.phase for axis in axes],
            is_truncated=[axis.is_truncated for axis in axes],
            scale=scale,
            key_padding_mask=None if visual.valid is None else visual.valid.unflatten(1, grid),
            **inputs.exact().extras(),
        )
        out.copy_(result.flatten(1, 3))
        return prod(map(seen_share, axes))

    def _sees_everything(self, layout: TokenLayout) -> bool:
        return all(axis.is_dense for axis in self.axes(layout))


def check_phase(phase: object) -> None:
    """Raises ValueError unless a phase is (height, width) in tokens."""
    if not isinstance(phase, tuple) or len(phase) != 2:
        raise ValueError(f"phase must be (height, width) in tokens, got phase={phase!r}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in phase):
        raise ValueError(f"phase must be two integers of at least 0, got phase={phase!r}")


def spread(extent: Extent, missing: Grid) -> Grid:
    """Spreads the short forms of an extent over (frames, height, width)."""
    if isinstance(extent, int):
        extent = (extent, extent)
    return (*missing[: 3 - len(extent)], *extent)


def check_extent(name: str, extent: object) -> None:
    """Raises ValueError unless a knob is a number of tokens in one of the forms of `Extent`."""
    numbers = extent if isinstance(extent, tuple) else (extent,)
    counts = (2, 3) if isinstance(extent, tuple) else (1,)
    if len(numbers) not in counts or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers
    ):
        raise ValueError(
            f"{name} must be a number of tokens of at least 1, (height, width) or "
            f"(frames, height, width), got {name}={extent!r}"
        )
