"""Token shapes of real models: what one self-attention call of a layer looks like."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from diffaccel.layout import Grid, TokenLayout

DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0)
GATE_SUFFIX = " gate"


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call, batch 1. Visual queries attend visual keys and all text.

    Args:
        name: How the command line calls it.
        grid: (frames, height, width) of the visual tokens, N of them.
        text: Text keys T that every query sees, 0 for models whose text has attention of its own.
        heads: H.
        dim: D.
    """

    name: str
    grid: Grid
    text: int
    heads: int
    dim: int

    @property
    def visual(self) -> int:
        """Number of visual tokens N."""
        return prod(self.grid)

    @property
    def layout(self) -> TokenLayout:
        """The sequence, text first."""
        return TokenLayout.video(*self.grid, text_before=self.text)

    @property
    def all_pairs(self) -> int:
        """Query-key pairs of all heads that dense attention of the visual queries computes."""
        return self.heads * self.visual * (self.visual + self.text)


_ALL = (
    Shape("flux-1k", (1, 64, 64), 512, 24, 128),
    Shape("flux-2k", (1, 128, 128), 512, 24, 128),
    Shape("flux-4k", (1, 256, 256), 512, 24, 128),
    Shape("sdxl-4096", (1, 64, 64), 0, 10, 64),
    Shape("sdxl-1024", (1, 32, 32), 0, 20, 64),
    Shape("sd3-1k", (1, 64, 64), 333, 24, 64),
    Shape("wan-1.3b-480p", (21, 30, 52), 0, 12, 128),
    Shape("wan-14b-480p", (21, 30, 52), 0, 40, 128),
    Shape("wan-1.3b-720p", (21, 45, 80), 0, 12, 128),
    Shape("wan-14b-720p", (21, 45, 80), 0, 40, 128),
    Shape("hunyuan-720p", (33, 45, 80), 0, 24, 128),
    Shape("embedded-256", (1, 16, 16), 32, 4, 64),
    Shape("embedded-1k", (1, 64, 64), 32, 4, 64),
    Shape("embedded-4k", (1, 256, 256), 32, 4, 64),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}


def gate_shape(shape: Shape) -> Shape:
    """The small problem on which an op must be right before its speed on `shape` counts.

    The same head dim, number of grid axes and kind of text; ragged blocks; two heads; 486 visual
    tokens, which the fp64 oracle takes in its stride.
    """
    grid = (1, 18, 27) if shape.grid[0] == 1 else (3, 9, 18)
    return Shape(shape.name + GATE_SUFFIX, grid, min(shape.text, 37), 2, shape.dim)
