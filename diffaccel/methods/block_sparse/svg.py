"""Sparse VideoGen: heads that look at their frame, heads that look at their place (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.base import DenseLayers
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import SpatialTemporal


@dataclass(frozen=True, slots=True, repr=False)
class SVGAttn(PublishedSparseAttn):
    """Computes the blocks nearest in time or nearest in place, whichever errs less in a head.

    "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity"
    (Xi et al., 2025, https://arxiv.org/abs/2502.01776): `SpatialTemporal`.

    Args:
        keep: Share of the key blocks that is computed, above 0 to 1: 0.3 is published for Wan at
            720p, 0.25 for HunyuanVideo.
        rows: Query rows on which heads are judged, at least 1.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`; by default a fifth of
            the steps are dense and, 3 %, one layer, as published for Wan (HunyuanVideo: 0.1).
    """

    keep: float = 0.3
    _: KW_ONLY
    rows: int = 64
    order: str = "raster"
    dense_steps: int | float | None = 0.2
    dense_layers: DenseLayers = 1

    def parts(self) -> Parts:
        """The pattern of each head as a whole."""
        return self.combined(SpatialTemporal(self.keep, self.rows))
