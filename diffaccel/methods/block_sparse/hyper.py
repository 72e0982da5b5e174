"""HyperAttention: blocks with hashes in common, and drawn keys for the others (2023)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.correctors import Corrector
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import HashedBuckets


@dataclass(frozen=True, slots=True, repr=False)
class HyperAttn(PublishedSparseAttn):
    """Computes the blocks with the most hashes in common; a drawn key stands for each other one.

    "HyperAttention: Long-context Attention in Near-Linear Time" (Han et al., 2023,
    https://arxiv.org/abs/2310.05869): `HashedBuckets` with `SampledKeys`. There tokens are sorted
    by their hash; here blocks of the grid stay whole.

    Args:
        keep: Share of the key blocks that each row computes, above 0 to 1.
        projections: Signs of a hash, 1 to 16.
        bucket: Keys per bucket, at least 1.
        seed: Of the hashes.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`.
    """

    keep: float = 0.25
    _: KW_ONLY
    projections: int = 7
    bucket: int = 256
    seed: int = 0
    order: str = "raster"
    corrector: Corrector | str = "sampled"

    def parts(self) -> Parts:
        """The buckets, and a share of each row."""
        return self.combined(HashedBuckets(self.projections, self.bucket, self.seed), self.keep)
