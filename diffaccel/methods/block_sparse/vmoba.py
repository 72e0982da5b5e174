"""VMoBA: blocks of time, of the plane and of both in turn, as many as a head needs (2025)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import VideoBlockGate
from diffaccel.methods.block_sparse.selectors.vmoba import Ranking


@dataclass(frozen=True, slots=True, repr=False)
class VMoBAAttn(PublishedSparseAttn):
    """Computes the blocks that hold a share of the similarity of a head, cut anew in each layer.

    "VMoBA: Mixture-of-Block Attention for Video Diffusion Models" (2025,
    https://arxiv.org/abs/2506.23858), without training: `VideoBlockGate` in the order "cyclic",
    for blocks of queries and keys of one size (there: single queries, and blocks of hundreds of
    keys).

    Args:
        threshold: Share of the similarity that is kept, 0 to 1; None keeps `keep` of the blocks.
        ranking: "row", "head" or "overall": over which blocks similarities are compared.
        keep: Share of the key blocks, above 0 to 1, where `threshold` is None.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`; by default the first
            12 of 50 steps are dense, as published.
    """

    threshold: float | None = 0.25
    _: KW_ONLY
    ranking: Ranking = "head"
    keep: float = 0.25
    order: str = "cyclic"
    dense_steps: int | float | None = 0.24

    def parts(self) -> Parts:
        """The gate with its own budget."""
        return self.combined(VideoBlockGate(self.ranking, self.threshold), self.keep)
