"""Sol-Attn: blocks that stand out, and the others in the softmax as their means (2026)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.base import DenseLayers
from diffaccel.methods.block_sparse.correctors import Corrector
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import ProxyDeviations


@dataclass(frozen=True, slots=True, repr=False)
class SolAttn(PublishedSparseAttn):
    """Computes the blocks that stand out by their mean key; the others are one summary per block.

    "Sol-Attn" (2026, https://arxiv.org/abs/2607.24027), the sparse attention of SGLang, TensorRT
    and ComfyUI: `ProxyDeviations` with `BlockTail`, blocks of 64 along the raster.

    Args:
        tau: Standard deviations above which a block is kept.
        keep: Share of the key blocks that each row keeps instead, above 0 to 1; None for `tau`.
        diagonal: Blocks on either side of its own that a block always keeps.
        sinks: First blocks of the order that all keep and that keep all.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`; by default a fifth of
            the steps (published: 10) and the first 2 layers are dense.
    """

    tau: float = 1.0
    _: KW_ONLY
    keep: float | None = None
    diagonal: int = 1
    sinks: int = 0
    block: int = 64
    order: str = "raster"
    corrector: Corrector | str = "tail"
    dense_steps: int | float | None = 0.2
    dense_layers: DenseLayers = 2

    def parts(self) -> Parts:
        """Sol-Attn's rule, or as many of its best blocks as are asked for."""
        tau = self.tau if self.keep is None else None
        selector = ProxyDeviations(tau, self.diagonal, self.sinks)
        return self.combined(selector, 1.0 if self.keep is None else self.keep)
