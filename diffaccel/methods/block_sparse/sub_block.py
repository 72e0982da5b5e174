"""SubBlock: the blocks with the largest attention between means of their parts (2026)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.block_sparse.selectors import SubBlocks


@dataclass(frozen=True, slots=True, repr=False)
class SubBlockAttn(PublishedSparseAttn):
    """Computes the blocks with the largest attention between means of parts of blocks.

    SubBlock, the router of SGLang's diffusion backend (https://github.com/sgl-project/sglang):
    `SubBlocks`, blocks of 64 in parts of 16. There the number of blocks is rounded up to eights.

    Args:
        keep: Share of the key blocks that each row computes, above 0 to 1.
        query_parts: Parts of a query block, a power of two.
        key_parts: Parts of a key block, a power of two.
        p_remain, block, order, neighbors, first_frame, reuse, hysteresis: As of
            `BlockSparseMethod`.
        corrector: As of `PublishedSparseAttn`.
        dense_steps, dense_layers: As of `ScheduledMethod`; by default the first
            10 of 50 steps are dense, as published.
    """

    keep: float = 0.25
    _: KW_ONLY
    query_parts: int = 4
    key_parts: int = 4
    block: int = 64
    order: str = "raster"
    dense_steps: int | float | None = 0.2

    def parts(self) -> Parts:
        """The parts, and a share of each row."""
        return self.combined(SubBlocks(self.query_parts, self.key_parts), self.keep)
