"""What block-sparse attention computes beside its blocks, in terms of dense attention."""

from __future__ import annotations

from diffaccel.methods.block_sparse.correctors import (
    BlockSummaries,
    BlockTail,
    Corrector,
    PooledReallocation,
)
from diffaccel.methods.block_sparse.selectors import ExpectedError, Selector

LENGTH, DIM = 1 << 14, 128
"""Where costs are stated: tokens N and channels D of a head."""


def added_parts(selector: Selector, corrector: Corrector, block: int) -> dict[str, float]:
    """Multiply-adds of each part over the 2 N**2 D of dense attention, at `LENGTH` and `DIM`.

    Counted, not timed; sums, exponentials and block lists are not counted.

    Args:
        selector: One product of block means, two for `ExpectedError`. What others do beyond that
            is not counted.
        corrector: What is done about the blocks left out.
        block: Tokens per block.
    """
    products = 1 / (2 * block**2)  # of all block means with all block means
    parts = {"selector": products * (2 if isinstance(selector, ExpectedError) else 1)}
    if isinstance(corrector, BlockTail):
        parts["tail"] = 2 * products
    if isinstance(corrector, PooledReallocation):
        parts["reallocation"] = products * (3 if corrector.gapr else 1)
    if isinstance(corrector, BlockSummaries):
        parts["summaries"] = 1 / block
        if corrector.variance:
            parts["variance"] = 1 / (2 * block)
        if corrector.fit != "none":
            parts["exact rows"] = corrector.rows / LENGTH
        if corrector.value_term:
            parts["value term"] = DIM / (2 * block**2) + DIM / LENGTH
    return parts


def added_cost(selector: Selector, corrector: Corrector, block: int) -> float:
    """The sum of `added_parts`."""
    return sum(added_parts(selector, corrector, block).values())
