"""Sliding windows of the size on which the model was trained, inward and in other forms."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod, sqrt
from typing import Literal, get_args

from diffaccel.errors import check_kinds
from diffaccel.kernels import WindowAxis
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.windows.base import Extent, WindowMethod, check_extent, check_phase, spread

Variant = Literal["inward", "truncated", "shifted", "tile", "block"]


@dataclass(frozen=True, slots=True, repr=False)
class SlidingWindowAttn(WindowMethod):
    """Attends to a window as large as the picture on which the model was trained.

    A model that is run far above its training size sees more tokens than it ever did, and
    repeats itself or falls apart. With a window of its training size, every query sees as many
    tokens, at as large distances, as in training: the inward sliding window of FreeSwim (Wu,
    Song, Tan, He, Liu, 2025, https://arxiv.org/abs/2511.14712). At or below that size nothing
    changes. What lies beyond the window is lost; composition must come from elsewhere.

    Text and condition tokens are attended exactly by all, and their own queries run dense.

    Args:
        window: Tokens of the window: one number for height and width, or (height, width), with
            all frames visible; or (frames, height, width). None: the model's native size, which
            `set_attn_processor` knows; rounded up to odd numbers for the sliding variants.
        variant: How windows lie.
            "inward": centred on the query, moved inward at borders.
            "truncated": centred on the query, cut off at borders (corners see a quarter).
            "tile": queries of one `tile` share a window ("Fast Video Generation with Sliding
            Tile Attention", Zhang et al., 2025, https://arxiv.org/abs/2502.04507).
            "block": the grid is cut into windows; the last one moves inward and overlaps.
            "shifted": as "block" in even layers, in odd ones shifted by half a window and cut
            off at borders ("Swin Transformer", Liu et al., 2021,
            https://arxiv.org/abs/2103.14030, with truncation in place of the cyclic shift).
        tile: Tokens of a tile, in the forms of `window`; only "tile" uses it.
        token_growth: Factor g by which the softmax is sharpened as for g times as many tokens
            as the model's native picture has, n: scores times sqrt(log_n(g * n)). 1 leaves them;
            FreeSwim uses 2.
        phase: Queries (rows, columns) by which the first tile or block is shorter, modulo its
            size: where their borders lie; for "tile" and "block". See `JitteredAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.

    Example:
        >>> pipe.set_attn_processor(SlidingWindowAttn())
        >>> layout = TokenLayout.video(21, 68, 120)
        >>> output = SlidingWindowAttn((31, 53)).attend(query, key, value, layout)
    """

    window: Extent | None = None
    variant: Variant = "inward"
    tile: Extent = 8
    token_growth: float = 1.0
    phase: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.window is not None:
            check_extent("window", self.window)
        check_extent("tile", self.tile)
        if self.variant not in get_args(Variant):
            raise ValueError(
                f"variant must be one of {', '.join(get_args(Variant))}, got "
                f"variant={self.variant!r}"
            )
        if not self.token_growth >= 1.0:
            raise ValueError(
                f"token_growth must be at least 1, got token_growth={self.token_growth}; 1 leaves "
                "the softmax as it is"
            )
        check_phase(self.phase)
        ScheduledMethod.__post_init__(self)

    def window_on(self, layout: TokenLayout) -> Grid:
        """Tokens of the window per axis (frames, height, width), not clamped to the grid.

        Raises:
            ValueError: If neither the method nor the layout says how large it is.
        """
        if self.window is not None:
            return spread(self.window, layout.grid)
        if layout.native is None:
            raise ValueError(
                "window=None takes the size on which the model was trained, which this layout "
                "does not tell; pass window=(height, width) in tokens"
            )
        height, width = layout.native[1:]
        if self.variant in ("inward", "truncated"):
            height, width = height // 2 * 2 + 1, width // 2 * 2 + 1
        return (layout.grid[0], height, width)

    def axes(self, layout: TokenLayout, layer: int | None = None) -> tuple[WindowAxis, ...]:
        """The window on the grid of a layout: frames, height, width."""
        is_shifted = self.variant == "shifted" and (layer or 0) % 2 == 1
        tiles = spread(self.tile, layout.grid)
        return tuple(
            self._axis(length, window, tile, phase, is_shifted)
            for length, window, tile, phase in zip(
                layout.grid, self.window_on(layout), tiles, (0, *self.phase), strict=True
            )
        )

    def temperature(self, layout: TokenLayout) -> float:
        """Factor on the scores of visual queries, from the tokens of one native frame."""
        native = layout.native or self.window_on(layout)
        tokens = prod(native[1:])
        if self.token_growth == 1.0 or tokens < 2:
            return 1.0
        return sqrt(log(self.token_growth * tokens) / log(tokens))

    def _axis(
        self, length: int, window: int, tile: int, phase: int, is_shifted: bool
    ) -> WindowAxis:
        if window >= length:
            return WindowAxis(length, length)
        if self.variant == "truncated":
            return WindowAxis(length, window, is_truncated=True)
        if self.variant == "tile":
            stride = min(tile, window)
            return WindowAxis(length, window, stride, phase=phase % stride)
        if self.variant == "inward":
            return WindowAxis(length, window)
        if is_shifted:
            half = window - window // 2
            return WindowAxis(length, window, window, phase=half % window, is_truncated=True)
        return WindowAxis(length, window, window, phase=phase % window)
