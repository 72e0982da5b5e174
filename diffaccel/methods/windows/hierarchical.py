"""Windows at full resolution beside windows on smaller pictures of the same scene."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from diffaccel.kernels import (
    WindowAxis,
    merge_attention,
    neighborhood_attention,
    seen_share,
)
from diffaccel.layout import Grid, Segment, TokenLayout
from diffaccel.methods.base import DenseLayers, check_schedule
from diffaccel.methods.exact_tokens import other_rows
from diffaccel.methods.windows.base import Extent, WindowMethod, check_extent, spread


@dataclass(frozen=True, slots=True)
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
        dense_steps: First denoising steps that run dense. None: as published, 0 without a model.
        dense_layers: Layers that run dense: a tuple of indices, or the number of first layers.
            None: as published, none without a model.
    """

    window: Extent = 16
    coarse_window: Extent = 12
    dense_steps: int | None = None
    dense_layers: DenseLayers = None

    def __post_init__(self) -> None:
        for name in ("window", "coarse_window"):
            check_extent(name, getattr(self, name))
        check_schedule(self.dense_steps, self.dense_layers)

    def axes(self, layout: TokenLayout, layer: int | None = None) -> tuple[WindowAxis, ...]:
        """The window on the grid of a layout: frames, height, width."""
        return _inward(layout.grid, self.window)

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Share of the pairs that windows in all pictures let through, exactly."""
        return 1.0 if self._is_dense(layout, None) else self._density(layout)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        layer: int | None,
    ) -> tuple[Tensor, Tensor | float]:
        coarse, exact = _split(layout)
        if not coarse or self._is_dense(layout, layer):
            return WindowMethod._attend(
                self, query, key, value, layout, scale=scale, key_padding_mask=key_padding_mask,
                layer=layer,
            )  # fmt: skip
        output = other_rows(query, key, value, layout, scale, key_padding_mask)
        valid, others = key_padding_mask, {}
        if exact:
            others["extra_key"], others["extra_value"] = (
                torch.cat([x[:, part] for part in exact], 1) for x in (key, value)
            )
            if valid is not None:
                others["extra_padding_mask"] = torch.cat([valid[:, part] for part in exact], 1)
        visual, grid = layout.visual_slice, layout.grid
        q, k, v = (x[:, visual].unflatten(1, grid) for x in (query, key, value))
        fine = neighborhood_attention(
            q, k, v, [axis.kernel for axis in self.axes(layout)], scale=scale,
            key_padding_mask=None if valid is None else valid[:, visual].unflatten(1, grid),
            return_lse=True, **others,
        )  # fmt: skip
        parts = [fine]
        for segment, place in coarse:
            k, v = (x[:, place].unflatten(1, segment.grid) for x in (key, value))
            mask = None if valid is None else valid[:, place].unflatten(1, segment.grid)
            parts.append(self._attend_coarse(q, k, v, segment.grid, scale, mask))
        flat = [(part.flatten(1, 3), lse.flatten(1, 3)) for part, lse in parts]
        output[:, visual] = merge_attention(*map(list, zip(*flat, strict=True)))[0]
        return output, self._density(layout)

    def _attend_coarse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Grid,
        scale: float | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attends the window around the same place of a smaller grid; output and lse of query.

        The queries over one coarse token share its window, so they become heads of it.
        """
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

    def _density(self, layout: TokenLayout) -> float:
        coarse, _ = _split(layout)
        grids = [layout.grid, *(segment.grid for segment, _ in coarse)]
        extents = [self.window, *(self.coarse_window for _ in coarse)]
        left_out = sum(
            prod(grid) * (1 - prod(map(seen_share, _inward(grid, extent))))
            for grid, extent in zip(grids, extents, strict=True)
        )
        return 1.0 - left_out * layout.visual.length / layout.length**2


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


def _divides(grid: Grid | None, large: Grid | None) -> bool:
    if grid is None or large is None or grid[0] != large[0]:
        return False
    return all(side % part == 0 for part, side in zip(grid, large, strict=True))
