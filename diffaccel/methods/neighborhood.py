"""Neighborhood attention: every visual token attends a window around it, and all text."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from diffaccel.kernels import dense_attention, neighborhood_attention
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import (
    DenseLayers,
    Method,
    check_schedule,
    other_keys,
    total_density,
)

KEPT_RATE = {"cpu": 0.4, "cuda": 0.6}
"""FLOP rate inside the windows in terms of dense attention. The CPU's is measured at 16k tokens
(2 AVX2 cores, fp32); the GPU's is what published kernels reach, not measured here."""

Extent = int | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class NeighborhoodAttn(Method):
    """Attends to a window of the token grid around each query, exactly, and to nothing beyond.

    The window slides with the query and moves inward at borders ("Generalized Neighborhood
    Attention", Hassani et al., 2025, https://arxiv.org/abs/2504.16922), so that every query sees
    the same number of tokens and no borders of blocks can show. With a window of the size on
    which the model was trained, positions and number of keys stay what it knows at any size of
    the picture. What lies beyond the window is lost: composition must come from elsewhere, such
    as a smaller picture that is refined.

    Text and condition tokens are attended exactly by all, and their own queries run dense.

    Args:
        kernel_size: Tokens of the window: one number for height and width, or (height, width),
            with all frames visible; or (frames, height, width). An axis shorter than its window
            is dense. 64 tokens are 1024 pixels in FLUX.
        stride: Neighbouring queries that share a window, in the same forms, at most
            `kernel_size`; 1 slides smoothly, more is faster on a GPU.
        dilation: Distance between the tokens of a window, in the same forms.
        dense_steps: First denoising steps that run dense. None: as published, 0 without a model.
        dense_layers: Layers that run dense: a tuple of indices, or the number of first layers.
            None: as published, none without a model.

    Example:
        >>> layout = TokenLayout.image(256, 256, text_before=512)
        >>> output = NeighborhoodAttn(80).attend(query, key, value, layout)
    """

    kernel_size: Extent = 64
    stride: Extent = 1
    dilation: Extent = 1
    dense_steps: int | None = None
    dense_layers: DenseLayers = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            extent = getattr(self, name)
            numbers = extent if isinstance(extent, tuple) else (extent,)
            counts = (2, 3) if isinstance(extent, tuple) else (1,)
            if len(numbers) not in counts or not all(
                isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers
            ):
                raise ValueError(
                    f"{name} must be a number of tokens of at least 1, (height, width) or "
                    f"(frames, height, width), got {name}={extent!r}"
                )
        large = (1 << 30,) * 3
        for kernel, stride in zip(self._extent(self.kernel_size, large),
                                  self._extent(self.stride, (1, 1, 1)), strict=True):  # fmt: skip
            if stride > kernel:
                raise ValueError(
                    f"stride must not exceed kernel_size, got stride={self.stride!r} with "
                    f"kernel_size={self.kernel_size!r}"
                )
        check_schedule(self.dense_steps, self.dense_layers)

    def windows(self, grid: Grid) -> tuple[Grid, Grid, Grid]:
        """Kernel size, stride and dilation per axis on a grid (frames, height, width).

        Clamped to what fits: a window at most as long as its axis, a dilation that leaves it
        inside, a stride of at most the window.
        """
        kernel = tuple(map(min, self._extent(self.kernel_size, grid), grid))
        reach = (length // size for length, size in zip(grid, kernel, strict=True))
        dilation = tuple(map(min, self._extent(self.dilation, (1, 1, 1)), reach))
        return kernel, tuple(map(min, self._extent(self.stride, (1, 1, 1)), kernel)), dilation

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Tokens in the windows over the rate on them."""
        if layout.grid is None or self.windows(layout.grid)[0] == layout.grid:
            return None
        kept = prod(self.windows(layout.grid)[0]) / prod(layout.grid)
        return total_density(kept, layout) / KEPT_RATE.get(device, KEPT_RATE["cpu"])

    @staticmethod
    def _extent(extent: Extent, missing: Grid) -> Grid:
        """Spreads the short forms over (frames, height, width)."""
        if isinstance(extent, int):
            extent = (extent, extent)
        return (*missing[: 3 - len(extent)], *extent)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        scheduled_dense: bool,
    ) -> tuple[Tensor, Tensor | float]:
        grid = layout.grid
        kernel, stride, dilation = self.windows(grid) if grid else (None, None, None)
        if scheduled_dense or kernel == grid:
            dense = dense_attention(
                query, key, value, scale=scale, key_padding_mask=key_padding_mask
            )
            return dense, 1.0
        output = query.new_empty(query.shape)
        for part in layout.other_slices:
            output[:, part] = dense_attention(
                query[:, part], key, value, scale=scale, key_padding_mask=key_padding_mask
            )
        visual = layout.visual_slice
        others = other_keys(key, value, key_padding_mask, layout)
        valid = None if key_padding_mask is None else key_padding_mask[:, visual]
        result = neighborhood_attention(
            *(x[:, visual].unflatten(1, grid) for x in (query, key, value)),
            kernel,
            stride=stride,
            dilation=dilation,
            scale=scale,
            key_padding_mask=None if valid is None else valid.unflatten(1, grid),
            extra_key=others.key if layout.other_slices else None,
            extra_value=others.value if layout.other_slices else None,
            extra_padding_mask=others.valid if layout.other_slices else None,
        )
        output[:, visual] = result.flatten(1, 3)
        return output, total_density(prod(kernel) / prod(grid), layout)
