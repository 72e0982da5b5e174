"""The attention that all block-sparse methods share: order, estimate, select, correct, attend."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import block_lists
from diffaccel.kernels.block_sparse.call import BlockSparseCall
from diffaccel.kernels.block_sparse.op import attend
from diffaccel.kernels.block_statistics.call import StatisticsCall
from diffaccel.kernels.block_statistics.op import summarise
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows, Chosen
from diffaccel.methods.block_sparse.budgets import Ask, Budget, Scores, with_mass
from diffaccel.methods.block_sparse.correctors.base import Attended, Corrector, Summary
from diffaccel.methods.block_sparse.forced import ForcedBlocks, forced_blocks
from diffaccel.methods.block_sparse.order import (
    CYCLES,
    ORDERS,
    TokenOrder,
    orders_named,
    token_order,
)
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.inputs import AttentionInputs, ExactTokens, Position, VisualTokens
from diffaccel.methods.visual import COMPUTED_DENSELY, VisualMethod, total_density

_CPU = torch.device("cpu")
KEPT_RATE = {"cpu": 0.65, "cuda": 0.75}
"""FLOP rate on kept blocks of 128 in terms of dense attention. The CPU's is measured at 16k
tokens (2 AVX2 cores, fp32); the GPU's is what published kernels reach, not measured here."""


class Parts(NamedTuple):
    """What a block-sparse method is made of.

    Args:
        selector: Which blocks are worth computing.
        budget: How many are.
        corrector: What is done about the others.
        keep: Share of the key blocks that the budget gives out.
        p_remain: Share of the attention mass that is computed at least.
    """

    selector: Selector
    budget: Budget
    corrector: Corrector
    keep: float
    p_remain: float = 0.0

    @property
    def ask(self) -> Ask:
        """What the budget is told: a floor on the mass only where scores are mass."""
        return Ask(self.keep, self.p_remain if self.selector.gives_mass else 0.0)

    @property
    def floor(self) -> float:
        """Mass that is kept at least, where the budget cannot see to it."""
        return 0.0 if self.selector.gives_mass else self.p_remain

    @property
    def compares_heads(self) -> bool:
        """Whether heads cannot be computed apart."""
        return self.selector.compares_heads or self.budget.compares_heads


class Blocks(NamedTuple):
    """What a method makes of a layout before it sees any data.

    Args:
        number: Blocks of visual tokens NB.
        order: Which tokens form a block.
        forced: Blocks that are kept whatever their score.
        share: Of the blocks that the budget asks for; None where the data decide.
        max_count: Blocks that a row keeps at most.
    """

    number: int
    order: TokenOrder
    forced: ForcedBlocks
    share: float | None
    max_count: int

    @property
    def keeps_all(self) -> bool:
        """Whether every block is computed."""
        return self.share == 1.0 or self.forced.is_everything

    def kept(self, counts_forced: bool) -> float | None:
        """Share of the blocks that is computed, None where the data decide.

        Args:
            counts_forced: Whether forced blocks count towards what is asked for.
        """
        if self.share is None:
            return None
        if counts_forced:
            return max(self.share, self.forced.share)
        return 1.0 - (1.0 - self.share) * (1.0 - self.forced.share)


class BlockPlan(NamedTuple):
    """What the kernel is told: block lists, and what stands for the blocks left out."""

    chosen: Chosen
    row_scale: Tensor | None
    row_bias: Tensor | None
    summary: Summary | None


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
        order: "hilbert", "brick", "columns" or "raster": which tokens form a block; "cyclic":
            raster, columns and bricks in turn, layer by layer.
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
        if self.order not in ORDERS | CYCLES:
            raise ValueError(
                f"order must be one of {', '.join(ORDERS | CYCLES)}, got order={self.order!r}"
            )
        if self.first_frame not in (None, True, False):
            raise ValueError(
                f"first_frame must be None, True or False, got first_frame={self.first_frame!r}"
            )
        ScheduledMethod.__post_init__(self)

    def order_of(self, position: Position) -> str:
        """Name of the order at a position, a key of `ORDERS`."""
        orders = orders_named(self.order)
        return orders[(position.layer or 0) % len(orders)]

    def parts(self) -> Parts:
        """What is computed exactly, and what is done about the rest."""
        raise NotImplementedError(f"{type(self).__name__} does not implement parts")

    @property
    def compares_heads(self) -> bool:
        return self.parts().compares_heads

    def shape_reason(self, layout: TokenLayout) -> str:
        if layout.visual is None:
            return COMPUTED_DENSELY
        orders = orders_named(self.order)
        keeps_all = all(blocks_of(self, layout, _CPU, name).keeps_all for name in orders)
        return COMPUTED_DENSELY if keeps_all else ""

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Kept blocks over the rate on them; a floor on the kept mass may keep more."""
        density = self.expected_density(layout)
        if self.shape_reason(layout) or density is None:
            return None
        return density / KEPT_RATE.get(device, KEPT_RATE["cpu"])

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Blocks that are asked for or forced; a floor on the kept mass may keep more."""
        if self.shape_reason(layout):
            return 1.0
        orders, counts_forced = orders_named(self.order), self.parts().budget.counts_forced
        each = [blocks_of(self, layout, _CPU, name).kept(counts_forced) for name in orders]
        kept = [share for share in each if share is not None]
        if len(kept) < len(each):
            return None
        return total_density(sum(kept) / len(kept), layout)

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> Tensor:
        device = inputs.query.device
        blocks = blocks_of(self, inputs.layout, device, self.order_of(position))
        visual, exact = in_order(inputs.visual(), blocks.order), inputs.exact()
        with torch.autocast(device.type, enabled=False):  # estimates stay fp32
            plan = self.plan(visual, exact, position)
            chosen, summary, corrector = plan.chosen, plan.summary, self.parts().corrector
            call = BlockSparseCall(
                visual.query,
                visual.key,
                visual.value,
                chosen.indices,
                chosen.counts,
                self.block,
                self.block,
                visual.scale,
                visual.valid,
                **exact.extras(),
                row_scale=plan.row_scale,
                row_bias=plan.row_bias,
                centroids=None if summary is None else summary.centroids,
                return_lse=corrector.needs_lse,
                return_tail=corrector.needs_tail,
            )
            output = corrector.finish(chosen, summary, Attended(*attend(call)))
        out.index_copy_(1, blocks.order.order, output)
        return chosen.counts.float().mean() / blocks.number

    def plan(self, visual: VisualTokens, exact: ExactTokens, position: Position) -> BlockPlan:
        """Selects and corrects, some query blocks at a time to bound the memory.

        Args:
            visual: Visual tokens in block order.
            exact: What every query sees exactly.
            position: Where the call stands.
        """
        parts, device = self.parts(), visual.query.device
        blocks = blocks_of(self, visual.layout, device, self.order_of(position))
        needs = parts.selector.needs | parts.corrector.needs
        statistics = summarise(
            StatisticsCall(
                visual.query, visual.key, visual.value, self.block, visual.valid, needs=needs
            )
        )
        call = BlockCall(visual, exact, blocks.order, statistics, position)
        rows = call.rows()
        threshold = None
        if parts.budget.looks_at_all_rows:
            sample = BlockRows(call, slice(0, blocks.number, len(rows)))
            threshold = parts.budget.threshold(_scores(parts, sample, blocks), parts.ask)
        found = []
        for some in rows:
            scores = _scores(parts, some, blocks)
            kept = parts.budget.kept(scores, parts.ask, threshold)
            if scores.always is not None:
                kept = kept | scores.always
            if scores.forced is not None:  # whatever their score, unless they are padding
                kept = kept | (scores.forced & (statistics.counts > 0)[:, None, None])
            if parts.floor:
                kept = kept | with_mass(some.probability, parts.floor)
            lists = block_lists(kept, blocks.max_count)
            found.append((*lists, *(parts.corrector.correct(some, kept) or (None, None))))
        indices, counts, row_scale, row_bias = found[0] if len(found) == 1 else _joined(found)
        chosen = Chosen(call, indices, counts)
        return BlockPlan(chosen, row_scale, row_bias, parts.corrector.summarise(chosen))


@lru_cache(maxsize=64)
def blocks_of(
    method: BlockSparseMethod, layout: TokenLayout, device: torch.device, name: str
) -> Blocks:
    """Returns what a method makes of a layout with visual tokens, with its tensors on a device.

    `name` is that of the token order, one of those that the method has.
    """
    parts, number = method.parts(), -(-layout.visual.length // method.block)
    order = token_order(layout.grid, name, method.block).to(device)
    forced = forced_blocks(
        layout.grid,
        name,
        method.block,
        method.neighbors,
        bool(method.first_frame),
        parts.selector,
        device,
    )
    share = parts.budget.share(number, parts.ask)
    if share is None:
        share = parts.selector.share(order)
    max_count = parts.budget.max_count(number, forced.largest, parts.ask)
    if parts.floor or parts.selector.decides:
        max_count = number
    return Blocks(number, order, forced, share, max_count)


def _scores(parts: Parts, rows: BlockRows, blocks: Blocks) -> Scores:
    selector = parts.selector
    text = rows.probability[..., -1] if selector.gives_mass else None
    mask = blocks.forced.mask
    score = selector.score(rows)
    if score.shape[:2] != rows.query_mean.shape[:2]:
        score = score.expand(*rows.query_mean.shape[:3], -1)
    forced, always = None if mask is None else mask[rows.rows], None
    if selector.decides:
        always = score.isposinf()
        score = score.masked_fill(always, 0.0)
    return Scores(score, text, forced, always)


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


def _joined(parts: list[Any]) -> Any:
    """Puts the rows of lists and corrections one after the other."""
    columns = zip(*parts, strict=True)
    return tuple(None if x[0] is None else torch.cat(x, 2) for x in columns)
