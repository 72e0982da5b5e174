"""Windows at full resolution beside windows on smaller pictures of the same scene."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels import (
    WindowAxis,
    merge_attention,
    neighborhood_attention,
    seen_share,
)
from diffaccel.layout import Grid, Segment, TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.inputs import AttentionInputs, ExactTokens, Position
from diffaccel.methods.visual import total_density
from diffaccel.methods.windows.base import Extent, WindowMethod, check_extent, spread


@dataclass(frozen=True, slots=True, repr=False)
class HierarchicalWindowAttn(WindowMethod):
    """Attends to a window of the picture, to all text, and to the same place of smaller pictures.

    The hierarchical local attention of "Scale-DiT: Ultra-High-Resolution Image Generation with
    Hierarchical Local Attention" (Zhang et al., 2025, https://arxiv.org/abs/2510.16325): a small
    picture beside the large one tells every window what the whole looks like. The small picture
    is a condition segment with a grid, such as a reference image of FLUX Kontext, whose sides
    divide those of the picture; other condition tokens are attended exactly, like text.

    Exact over what it attends. Scale-DiT trains a LoRA for the tokens of the small picture;
    without it, this suits models that know reference images. Where there is no such segment it
    is `NeighborhoodAttn(window)`. Text and condition queries run dense over everything.

    Args:
        window: Tokens of the window in the picture: one number, or (height, width).
        coarse_window: Tokens of the window in each smaller picture, in the same forms.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    window: Extent = 16
    coarse_window: Extent = 12

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("window", "coarse_window"):
            check_extent(name, getattr(self, name))
        ScheduledMethod.__post_init__(self)

    def axes(self, layout: TokenLayout, layer: int | None = None) -> tuple[WindowAxis, ...]:
        """The window on the grid of a layout: frames, height, width."""
        return _inward(layout.grid, self.window)

    def expected_density(self, layout: TokenLayout) -> float:
        """Share of the pairs that windows in all pictures let through, exactly."""
        return 1.0 if self.shape_reason(layout) else total_density(self._kept(layout), layout)

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> float:
        coarse, exact = _split(inputs.layout)
        if not coarse:
            return WindowMethod.attend_visual(self, inputs, position, out)
        visual, valid, grid = inputs.visual(), inputs.mask, inputs.layout.grid
        q, k, v = (x.unflatten(1, grid) for x in (visual.query, visual.key, visual.value))
        fine = neighborhood_attention(
            q, k, v, [axis.kernel for axis in self.axes(inputs.layout)], scale=inputs.scale,
            key_padding_mask=None if visual.valid is None else visual.valid.unflatten(1, grid),
            return_lse=True, **_exact_tokens(inputs, exact).extras(),
        )  # fmt: skip
        parts = [fine]
        for segment, place in coarse:
            k, v = (x[:, place].unflatten(1, segment.grid) for x in (inputs.key, inputs.value))
            mask = None if valid is None else valid[:, place].unflatten(1, segment.grid)
            parts.append(self._attend_coarse((q, k, v), inputs.scale, mask))
        flat = [(part.flatten(1, 3), lse.flatten(1, 3)) for part, lse in parts]
        out.copy_(merge_attention(*map(list, zip(*flat, strict=True)))[0])
        return self._kept(inputs.layout)

    def _attend_coarse(
        self, tokens: tuple[Tensor, Tensor, Tensor], scale: float, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attends the window around the same place of a smaller grid; output and lse of query.

        The queries over one coarse token share its window, so they become heads of it.
        """
        query, key, value = tokens
        grid = cast(Grid, key.shape[1:4])
        batch, frames, height, width, heads, dim = query.shape
        rows, columns = grid[1:]
        cells = (height // rows, width // columns)
        grouped = query.unflatten(3, (columns, cells[1])).unflatten(2, (rows, cells[0]))
        grouped = grouped.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(4, 6)
        output, lse = neighborhood_attention(
            grouped, key, value, [axis.kernel for axis in _inward(grid, self.coarse_window)],
            scale=scale, key_padding_mask=valid, return_lse=True,
        )  # fmt: skip
        output = output.unflatten(4, (heads, *cells)).permute(0, 1, 2, 5, 3, 6, 4, 7)
        lse = lse.unflatten(4, (heads, *cells)).permute(0, 1, 2, 5, 3, 6, 4)
        shape = (batch, frames, height, width, heads)
        return output.reshape(*shape, dim), lse.reshape(shape)

    def _kept(self, layout: TokenLayout) -> float:
        """Keys that a visual query sees as a share of the visual ones, as if all others were."""
        coarse, _ = _split(layout)
        grids: list[Any] = [layout.grid, *(segment.grid for segment, _ in coarse)]
        extents = [self.window, *(self.coarse_window for _ in coarse)]
        left_out = sum(
            prod(grid) * (1 - prod(map(seen_share, _inward(grid, extent))))
            for grid, extent in zip(grids, extents, strict=True)
        )
        return 1.0 - left_out / layout.visual.length


def _inward(grid: Grid, extent: Extent) -> tuple[WindowAxis, ...]:
    kernels = map(min, spread(extent, grid), grid)
    return tuple(WindowAxis(*axis) for axis in zip(grid, kernels, strict=True))


def _split(layout: TokenLayout) -> tuple[list[tuple[Segment, slice]], list[slice]]:
    """Tells smaller pictures of the scene from tokens that are attended exactly."""
    coarse, exact, start = [], [], 0
    for segment in layout.segments:
        place = slice(start, start + segment.length)
        start += segment.length
        if segment.kind == "condition" and _divides(segment.grid, layout.grid):
            coarse.append((segment, place))
        elif segment.kind != "visual" and segment.length:
            exact.append(place)
    return coarse, exact


def _exact_tokens(inputs: AttentionInputs, parts: list[slice]) -> ExactTokens:
    if not parts:
        return ExactTokens(inputs.key[:, :0], inputs.value[:, :0], None)
    key, value = (torch.cat([x[:, part] for part in parts], 1) for x in (inputs.key, inputs.value))
    mask = inputs.mask
    valid = None if mask is None else torch.cat([mask[:, part] for part in parts], 1)
    return ExactTokens(key, value, valid)


def _divides(grid: Grid | None, large: Grid | None) -> bool:
    if grid is None or large is None or grid[0] != large[0]:
        return False
    return all(side % part == 0 for part, side in zip(grid, large, strict=True))
