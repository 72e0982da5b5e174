"""What a block-sparse method makes of a layout, and then of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import block_lists
from diffaccel.kernels.block_statistics.call import StatisticsCall
from diffaccel.kernels.block_statistics.op import summarise
from diffaccel.layout import TokenLayout
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows, Chosen
from diffaccel.methods.block_sparse.budgets import Ask, Scores, with_mass
from diffaccel.methods.block_sparse.correctors.base import Summary
from diffaccel.methods.block_sparse.forced import ForcedBlocks, forced_blocks
from diffaccel.methods.block_sparse.order import TokenOrder, token_order
from diffaccel.methods.block_sparse.promise import Promise, promised
from diffaccel.methods.block_sparse.reuse import (
    SAMPLED_BLOCKS,
    Selection,
    earlier_selection,
    has_drifted,
    steadied,
)
from diffaccel.methods.inputs import ExactTokens, Position, VisualTokens

if TYPE_CHECKING:
    from diffaccel.methods.block_sparse.base import BlockSparseMethod


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
    promise: Promise | None

    @property
    def density(self) -> float:
        """Share of the blocks that are computed; waits for the device."""
        chosen = self.chosen
        return float(chosen.counts.float().mean()) / chosen.call.number


@lru_cache(maxsize=64)
def blocks_of(
    method: BlockSparseMethod, layout: TokenLayout, device: torch.device, name: str
) -> Blocks:
    """Returns what a method makes of a layout with visual tokens, with its tensors on a device.

    `name` is that of the token order, one of those that the method has.
    """
    parts, block = method.parts(), method.block_on(device)
    number = -(-layout.visual.length // block)
    order = token_order(layout.grid, name, block).to(device)
    forced = forced_blocks(
        layout.grid,
        name,
        block,
        method.neighbors,
        bool(method.first_frame),
        parts.selector,
        device,
    )
    share = None if parts.max_error is not None else parts.budget.share(number, parts.ask)
    if share is None and parts.max_error is None:
        share = parts.selector.share(order)
    max_count = parts.budget.max_count(number, forced.largest, parts.ask)
    if parts.floor or parts.selector.decides or parts.max_error is not None:
        max_count = number
    return Blocks(number, order, forced, share, max_count)


def planned(
    method: BlockSparseMethod,
    visual: VisualTokens,
    exact: ExactTokens,
    position: Position,
    remembered: dict[str, Any] | None = None,
) -> BlockPlan:
    """Selects and corrects, some query blocks at a time to bound the memory.

    Args:
        method: What is computed.
        visual: Visual tokens in block order.
        exact: What every query sees exactly.
        position: Where the call stands.
        remembered: Has the "selection" of an earlier call, and gets that of this one.
    """
    parts, device = method.parts(), visual.query.device
    blocks = blocks_of(method, visual.layout, device, method.order_of(position))
    earlier, is_reused = earlier_selection(
        remembered or {}, position.step, blocks.order.name, method.reuse, method.reuse_passes
    )
    is_tested = is_reused and visual.query.device.type == "cpu"
    needs = parts.corrector.needs
    if is_tested or not is_reused:
        needs = needs | parts.selector.needs
    statistics = summarise(
        StatisticsCall(
            visual.query, visual.key, visual.value, blocks.order.block, visual.valid, needs=needs
        )
    )
    call = BlockCall(visual, exact, blocks.order, statistics, position)
    rows, promise = call.rows(), None
    if earlier is not None and is_tested:
        sample = BlockRows(call, slice(0, None, -(-blocks.number // SAMPLED_BLOCKS)))
        scores = parts.scores(sample, blocks.forced.of(sample.rows))
        is_reused = not has_drifted(scores, earlier.of(sample))
    if earlier is not None and is_reused:
        if position.memory is not None:
            position.memory.reused_calls += 1
        max_count, fitted = earlier.max_count, earlier.fitted
        choose: Callable[[BlockRows], Tensor] = earlier.of
    else:
        max_count, fitted = blocks.max_count, {} if method.reuse or method.reuse_passes else None
        ask = parts.ask
        if parts.max_error is not None:
            promise = promised(call, parts, blocks.forced.mask, parts.max_error)
            ask = ask._replace(keep=promise.keep)
        choose = _chooser(method, rows, blocks, ask, earlier)
    found = []
    for some in rows:
        kept = choose(some)
        lists = block_lists(kept, max_count)
        correction = parts.corrector.correct(some, kept) or (None, None)
        found.append((kept, *lists, *correction))
    kept, indices, counts, row_scale, row_bias = found[0] if len(found) == 1 else _joined(found)
    if remembered is not None and method.remembers and not is_reused:
        remembered["selection"] = Selection(
            kept, position.step, blocks.order.name, max_count, fitted
        )
    chosen = Chosen(call, indices, counts, fitted)
    summary = parts.corrector.summarise(chosen)
    return BlockPlan(chosen, row_scale, row_bias, summary, promise)


def _chooser(
    method: BlockSparseMethod,
    rows: list[BlockRows],
    blocks: Blocks,
    ask: Ask,
    earlier: Selection | None,
) -> Callable[[BlockRows], Tensor]:
    """Returns what says which blocks some of the rows compute, (B, H, R, NB) bool."""
    parts = method.parts()

    def scored(some: BlockRows) -> Scores:
        scores = parts.scores(some, blocks.forced.of(some.rows))
        if earlier is None or not method.hysteresis:
            return scores
        return steadied(scores, earlier.of(some), method.hysteresis)

    threshold = None
    if parts.budget.looks_at_all_rows and len(rows) > 1:
        sample = BlockRows(rows[0].call, slice(0, blocks.number, len(rows)))
        threshold = parts.budget.threshold(scored(sample), ask)

    def choose(some: BlockRows) -> Tensor:
        scores = scored(some)
        if len(rows) == 1:
            kept = parts.kept_of_all(scores, ask)
        else:
            kept = parts.kept(scores, ask, threshold)
        if parts.floor:
            kept = kept | with_mass(some.probability, parts.floor)
        return kept

    return choose


def _joined(parts: list[Any]) -> Any:
    """Puts the rows of lists and corrections one after the other."""
    columns = zip(*parts, strict=True)
    return tuple(None if x[0] is None else torch.cat(x, 2) for x in columns)
