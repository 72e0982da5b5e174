"""Neighborhood attention: every visual token attends a window around it, and all text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffaccel.errors import check_kinds
from diffaccel.kernels import WindowAxis
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.published import NEIGHBORHOODS
from diffaccel.methods.windows.base import Extent, WindowMethod, check_extent, check_phase, spread


@dataclass(frozen=True, slots=True, repr=False)
class NeighborhoodAttn(WindowMethod):
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
        is_causal: Whether frames see no later frame.
        phase: Queries (rows, columns) by which the first group of `stride` is shorter, modulo
            `stride`: where the borders between groups lie. See `JitteredAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.

    Example:
        >>> layout = TokenLayout.image(256, 256, text_before=512)
        >>> output = NeighborhoodAttn(80).attend(query, key, value, layout)
        >>> pipe.set_attn_processor(NeighborhoodAttn.like("flux-4k"))
    """

    kernel_size: Extent = 64
    stride: Extent = 1
    dilation: Extent = 1
    is_causal: bool = False
    phase: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("kernel_size", "stride", "dilation"):
            check_extent(name, getattr(self, name))
        if not isinstance(self.is_causal, bool):
            raise ValueError(
                f"is_causal must be True or False, got is_causal={self.is_causal!r}; it is about "
                "frames alone"
            )
        kernels = spread(self.kernel_size, (1 << 30,) * 3)
        for kernel, stride in zip(kernels, spread(self.stride, (1, 1, 1)), strict=True):
            if stride > kernel:
                raise ValueError(
                    f"stride must not exceed kernel_size, got stride={self.stride!r} with "
                    f"kernel_size={self.kernel_size!r}"
                )
        check_phase(self.phase)
        ScheduledMethod.__post_init__(self)

    @classmethod
    def like(cls, name: str, **knobs: object) -> NeighborhoodAttn:
        """Builds a published configuration.

        Args:
            name: "flux-4k" (256 x 256 tokens, windows of 80 x 80 in strides of 16),
                "hunyuan-720p" (30 x 48 x 80 tokens, windows of 18 x 24 x 24 in strides of
                16 x 8 x 8), or either with "-sliding", which moves with each query instead.
            knobs: Other knobs, such as `dense_steps`.
        """
        if name not in NEIGHBORHOODS:
            raise ValueError(
                f"the configuration must be one of {', '.join(NEIGHBORHOODS)}, got {name!r}; "
                "pass kernel_size and stride for any other"
            )
        kernel_size, stride = NEIGHBORHOODS[name]
        given: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride} | knobs
        return cls(**given)

    def windows(self, grid: Grid) -> tuple[Grid, Grid, Grid]:
        """Kernel size, stride and dilation per axis on a grid (frames, height, width).

        Clamped to what fits: a window at most as long as its axis, a dilation that leaves it
        inside, a stride of at most the window.
        """
        kernel: Any = tuple(map(min, spread(self.kernel_size, grid), grid))
        reach = (length // size for length, size in zip(grid, kernel, strict=True))
        dilation: Any = tuple(map(min, spread(self.dilation, (1, 1, 1)), reach))
        stride: Any = tuple(map(min, spread(self.stride, (1, 1, 1)), kernel))
        return kernel, stride, dilation

    def axes(self, layout: TokenLayout, layer: int | None = None) -> tuple[WindowAxis, ...]:
        """The window on the grid of a layout: frames, height, width."""
        causal = (self.is_causal, False, False)
        kernel, stride, dilation = self.windows(layout.grid)
        phase = tuple(p % s for p, s in zip((0, *self.phase), stride, strict=True))
        columns: Any = layout.grid, kernel, stride, dilation, causal, phase
        return tuple(WindowAxis(*values) for values in zip(*columns, strict=True))
