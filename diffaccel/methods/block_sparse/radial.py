"""Radial attention: windows that narrow with the distance in time (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.base import DenseLayers
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import RadialWindows


@dataclass(frozen=True, slots=True, repr=False)
class RadialAttn(PublishedSparseAttn):
    """Computes windows that halve as the distance in frames doubles; an image is dense.

    "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation"
    (Li et al., 2025, https://arxiv.org/abs/2506.19852): `RadialWindows`.

    Args:
        decay: Factor on the widths, above 0: 0.2 is published for Wan, 0.95 for HunyuanVideo.
        sink: Whether all see all of the first frame.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`; by default the first
            12 of 50 steps and, as published for Wan, the first layer are dense.
    """

    decay: float = 0.2
    _: KW_ONLY
    sink: bool = True
    order: str = "raster"
    dense_steps: int | float | None = 0.24
    dense_layers: DenseLayers = 1

    def parts(self) -> Parts:
        """The pattern as a whole."""
        return self.combined(RadialWindows(self.decay, self.sink))
