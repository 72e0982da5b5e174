"""The attention that all block-sparse methods share: order, estimate, select, correct, attend."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import Centroids
from diffaccel.kernels.block_sparse.call import BlockSparseCall
from diffaccel.kernels.block_sparse.op import attend
from diffaccel.kernels.block_statistics.call import StatisticsCall
from diffaccel.kernels.block_statistics.op import summarise
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.block_sparse.correctors import NoCorrection, Selected
from diffaccel.methods.block_sparse.estimator import block_attention, row_steps
from diffaccel.methods.block_sparse.order import ORDERS, TokenOrder, token_order
from diffaccel.methods.block_sparse.selectors import ForcedBlocks, TopBlocks, forced_blocks
from diffaccel.methods.inputs import AttentionInputs, ExactTokens, Position, VisualTokens
from diffaccel.methods.visual import COMPUTED_DENSELY, VisualMethod, total_density

KEPT_RATE = {"cpu": 0.65, "cuda": 0.75}
"""FLOP rate on kept blocks of 128 in terms of dense attention. The CPU's is measured at 16k
tokens (2 AVX2 cores, fp32); the GPU's is what published kernels reach, not measured here."""


class Blocks(NamedTuple):
    """What a method makes of a layout before it sees any data.

    Args:
        number: Blocks of visual tokens NB.
        order: Which tokens form a block.
        forced: Blocks that are kept whatever their probability.
        selector: Chooses the others that are kept.
        corrector: Accounts for those left out.
        top_k: Blocks that the selector asks for, in each row.
        max_count: Blocks that a row keeps at most.
    """

    number: int
    order: TokenOrder
    forced: ForcedBlocks
    selector: TopBlocks
    corrector: NoCorrection
    top_k: int
    max_count: int


class BlockPlan(NamedTuple):
    """What the kernel is told: block lists, and the correction of the blocks left out."""

    indices: Tensor
    counts: Tensor
    row_scale: Tensor | None
    row_bias: Tensor | None
    centroids: Centroids | None = None


@dataclass(frozen=True, slots=True, repr=False)
class BlockSparseMethod(VisualMethod):
    """A selector and a corrector over blocks of visual tokens; text is always exact.

    Visual queries attend to the selected visual blocks and to all text and condition tokens.
    Text and condition queries run dense over everything. A subclass says what its selector and
    its corrector are.

    Args:
        p_remain: Share of the attention mass that is computed at least, 0 to 1; 0 leaves the
            number of blocks alone in charge.
        block: Tokens per block, a power of two of at least 16.
        order: "hilbert", "brick" or "raster": which tokens form a block.
        neighbors: Whether blocks that touch in the grid are always kept.
        first_frame: Whether blocks with first-frame tokens always keep each other (video only).
            None: as published for the model family (True for Wan), False without a model.
    """

    _: KW_ONLY
    p_remain: float = 0.0
    block: int = 128
    order: str = "hilbert"
    neighbors: bool = False
    first_frame: bool | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.p_remain <= 1.0:
            raise ValueError(
                f"p_remain must lie in 0 to 1, got p_remain={self.p_remain}; it is the share of "
                "the attention mass that is computed exactly at least, 0 to switch it off"
            )
        block = self.block
        if not isinstance(block, int) or block < 16 or block & (block - 1):
            raise ValueError(
                f"block must be a power of two of at least 16, got {block=}; 128 suits most GPUs"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got order={self.order!r}")
        if self.first_frame not in (None, True, False):
            raise ValueError(
                f"first_frame must be None, True or False, got first_frame={self.first_frame!r}"
            )
        ScheduledMethod.__post_init__(self)

    def selector(self) -> TopBlocks:
        """Which key blocks are computed exactly."""
        raise NotImplementedError(f"{type(self).__name__} does not implement selector")

    def corrector(self) -> NoCorrection:
        """What is done about the others."""
        raise NotImplementedError(f"{type(self).__name__} does not implement corrector")

    def shape_reason(self, layout: TokenLayout) -> str:
        if layout.visual is None:
            return COMPUTED_DENSELY
        blocks = blocks_of(self, layout, torch.device("cpu"))
        keeps_all = blocks.top_k == blocks.number or blocks.forced.is_everything
        return COMPUTED_DENSELY if keeps_all else ""

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Kept blocks over the rate on them; a floor on the kept mass may keep more."""
        if self.shape_reason(layout):
            return None
        return self.expected_density(layout) / KEPT_RATE.get(device, KEPT_RATE["cpu"])

    def expected_density(self, layout: TokenLayout) -> float:
        """Blocks that are asked for or forced; a floor on the kept mass may keep more."""
        if self.shape_reason(layout):
            return 1.0
        blocks = blocks_of(self, layout, torch.device("cpu"))
        selected = blocks.top_k / blocks.number
        kept = 1.0 - (1.0 - selected) * (1.0 - blocks.forced.share)
        return total_density(kept, layout)

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> Tensor:
        device = inputs.query.device
        blocks = blocks_of(self, inputs.layout, device)
        order = blocks.order
        visual, exact = in_order(inputs.visual(), order), inputs.exact()
        with torch.autocast(device.type, enabled=False):  # the estimate stays fp32
            plan = self.plan(visual, exact)
        call = BlockSparseCall(
            visual.query,
            visual.key,
            visual.value,
            plan.indices,
            plan.counts,
            self.block,
            self.block,
            visual.scale,
            visual.valid,
            **exact.extras(),
            row_scale=plan.row_scale,
            row_bias=plan.row_bias,
            centroids=plan.centroids,
        )
        out.index_copy_(1, order.order, attend(call)[0])
        return plan.counts.float().mean() / blocks.number

    def plan(self, visual: VisualTokens, exact: ExactTokens) -> BlockPlan:
        """Selects and corrects, some query blocks at a time to bound the memory.

        Args:
            visual: Visual tokens in block order.
            exact: What every query sees exactly.
        """
        blocks = blocks_of(self, visual.layout, visual.query.device)
        corrector = blocks.corrector
        statistics = summarise(
            StatisticsCall(
                visual.query,
                visual.key,
                visual.value,
                self.block,
                visual.valid,
                needs=corrector.needs,
            )
        )
        parts = []
        for rows in row_steps(statistics, exact.key.shape[1]):
            probability = block_attention(statistics, exact, visual.scale, rows)
            forced = None if blocks.forced.mask is None else blocks.forced.mask[rows]
            lists = blocks.selector.lists(probability, forced, blocks.max_count)
            correction = corrector.correct(statistics, probability, lists[2], rows)
            parts.append(BlockPlan(*lists[:2], *(correction or (None, None))))
        plan = parts[0] if len(parts) == 1 else _joined(parts)
        selected = Selected(visual, exact, plan.indices, plan.counts, self.block)
        return plan._replace(centroids=corrector.centroids(statistics, selected))


@lru_cache(maxsize=64)
def blocks_of(method: BlockSparseMethod, layout: TokenLayout, device: torch.device) -> Blocks:
    """Returns what a method makes of a layout with visual tokens, with its tensors on a device."""
    number = -(-layout.visual.length // method.block)
    order = token_order(layout.grid, method.order, method.block).to(device)
    forced = forced_blocks(
        layout.grid, method.order, method.block, method.neighbors, bool(method.first_frame), device
    )
    selector = method.selector()
    return Blocks(
        number,
        order,
        forced,
        selector,
        method.corrector(),
        selector.top_k(number),
        selector.max_count(number, forced.largest),
    )


def in_order(visual: VisualTokens, order: TokenOrder) -> VisualTokens:
    """Copies visual tokens from raster order into block order, contiguous."""
    valid = visual.valid
    if valid is not None:
        valid = valid.index_select(1, order.order)
    query, key = into_order(visual.query, order), into_order(visual.key, order)
    value = into_order(visual.value, order)
    return VisualTokens(query, key, value, valid, visual.layout, visual.scale)


def into_order(tokens: Tensor, order: TokenOrder) -> Tensor:
    """Copies (B, N, H, D) tokens from raster order into block order, contiguous."""
    if order.name == "raster":
        return tokens
    # Scattering rows into fresh memory is faster on a CPU than gathering them.
    ordered = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    return ordered.index_copy_(1, order.inverse, tokens)


def _joined(parts: list[BlockPlan]) -> BlockPlan:
    """Puts the rows of plans one after the other."""
    columns: Any = zip(*(part[:4] for part in parts), strict=True)
    joined: Any = (None if x[0] is None else torch.cat(x, 2) for x in columns)
    return BlockPlan(*joined)
