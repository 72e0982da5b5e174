"""The attention that all block-sparse methods share: order, estimate, select, correct, attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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
from diffaccel.methods.block_sparse.correctors.base import Corrector, KernelOutput, Summary
from diffaccel.methods.block_sparse.forced import ForcedBlocks, forced_blocks
from diffaccel.methods.block_sparse.order import (
    CYCLES,
    ORDERS,
    TokenOrder,
    orders_named,
    token_order,
)
from diffaccel.methods.block_sparse.order_choice import (
    AUTO,
    CANDIDATES,
    TRIED_FROM,
    attend_in_best_order,
)
from diffaccel.methods.block_sparse.promise import Promise, promised
from diffaccel.methods.block_sparse.reuse import (
    SAMPLED_BLOCKS,
    Selection,
    earlier_selection,
    has_drifted,
    kind_of,
    steadied,
)
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.inputs import AttentionInputs, ExactTokens, Position, VisualTokens
from diffaccel.methods.visual import COMPUTED_DENSELY, Exactness, VisualMethod, total_density

if TYPE_CHECKING:
    from typing_extensions import Self

_CPU = torch.device("cpu")
KEPT_RATE = {"cpu": 0.65, "cuda": 0.75}
"""FLOP rate on kept blocks of 128 in terms of dense attention. The CPU's is measured at 16k
tokens (2 AVX2 cores, fp32); the GPU's is what published kernels reach, not measured here."""

TOO_MUCH_FOR_PROMISE = "the promised error takes more blocks than dense attention is worth"


class Parts(NamedTuple):
    """What a block-sparse method is made of.

    Args:
        selector: Which blocks are worth computing.
        budget: How many are.
        corrector: What is done about the others.
        keep: Share of the key blocks that the budget gives out.
        p_remain: Share of the attention mass that is computed at least.
        max_error: Relative error that is promised, in place of `keep`; None for no promise.
    """

    selector: Selector
    budget: Budget
    corrector: Corrector
    keep: float
    p_remain: float = 0.0
    max_error: float | None = None

    def scores(self, rows: BlockRows, forced: Tensor | None) -> Scores:
        """What the selector thinks of the key blocks of some query blocks.

        Args:
            rows: The query blocks, R of them.
            forced: (R, NB) bool, blocks that are kept whatever their score, or None.
        """
        text = rows.probability[..., -1] if self.selector.gives_mass else None
        score, always = self.selector.score(rows), None
        if score.shape[:2] != rows.query_mean.shape[:2]:
            score = score.expand(*rows.query_mean.shape[:3], -1)
        if self.selector.decides:
            always = score.isposinf()
            score = score.masked_fill(always, 0.0)
        if forced is not None:  # whatever their score, unless they are padding
            certain = forced & (rows.call.statistics.counts > 0)[:, None, None]
            always = certain if always is None else always | certain
        return Scores(score, text, forced, always)

    def kept(self, scores: Scores, ask: Ask, threshold: Tensor | None) -> Tensor:
        """What the budget keeps, and what is kept always: (B, H, R, NB) bool."""
        kept = self.budget.kept(scores, ask, threshold)
        return kept if scores.always is None else kept | scores.always

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
    promise: Promise | None

    @property
    def density(self) -> float:
        """Share of the blocks that are computed; waits for the device."""
        chosen = self.chosen
        return float(chosen.counts.float().mean()) / chosen.call.number


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
            raster, columns and bricks in turn, layer by layer. "auto": raster or brick for each
            layer, whichever errs less on 64 rows of its first sparse call in a run from a fifth
            of the schedule on (on the output as it is, by `attend_in_best_order`; that call
            computes both). Until then, and where calls know nothing of each other, as without a
            model, raster, which predictions of density assume too.
        neighbors: Whether blocks that touch in the grid are always kept.
        first_frame: Whether blocks with first-frame tokens always keep each other (video only).
            None: as published for the model family (True for Wan), False without a model.
        reuse: For how many further steps a layer takes its block lists, and what its corrector
            has fitted, instead of selecting anew; 0 selects in each call. On a CPU only as long
            as the lists hold nine tenths of the score that fresh ones would, in a sample of
            query blocks; elsewhere nobody asks, which would wait for the device. Lists are those
            of the same pass of guidance. Holds NB**2 bytes for each head and sample of a layer.
        reuse_passes: Whether further passes of guidance take the block lists of the first,
            likewise, where they call the model one after the other; passes in one batch select
            each for itself.
        hysteresis: The score of blocks that a layer kept before is multiplied by 1 + hysteresis,
            so that choices near the border do not flicker from step to step; 0 forgets. Holds as
            much as `reuse`.
    """

    density_knob: ClassVar[str] = "keep"
    """The knob that a knob with `_end` after its name lets follow the schedule."""

    _: KW_ONLY
    p_remain: float = 0.0
    block: int = 128
    order: str = "hilbert"
    neighbors: bool = False
    first_frame: bool | None = None
    reuse: int = 0
    reuse_passes: bool = False
    hysteresis: float = 0.0

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
        if self.order not in (AUTO, *CYCLES, *ORDERS):
            known = ", ".join((AUTO, *CYCLES, *ORDERS))
            raise ValueError(f"order must be one of {known}, got order={self.order!r}; choose one")
        if not isinstance(self.reuse, int) or self.reuse < 0:
            raise ValueError(
                f"reuse must be a number of steps of at least 0, got reuse={self.reuse}; 0 "
                "selects in each step"
            )
        if not 0.0 <= self.hysteresis < float("inf"):
            raise ValueError(
                f"hysteresis must be at least 0 and finite, got hysteresis={self.hysteresis}; 0.2 "
                "favours blocks that were kept before by a fifth"
            )
        if self.first_frame not in (None, True, False):
            raise ValueError(
                f"first_frame must be None, True or False, got first_frame={self.first_frame!r}"
            )
        ScheduledMethod.__post_init__(self)

    @property
    def order_names(self) -> tuple[str, ...]:
        """Names of the orders that layers take in turn, keys of `ORDERS`."""
        return CANDIDATES[:1] if self.order == AUTO else orders_named(self.order)

    def order_of(self, position: Position) -> str:
        """Name of the order at a position, a key of `ORDERS`."""
        orders = self.order_names
        return orders[(position.layer or 0) % len(orders)]

    @property
    def _remembers(self) -> bool:
        """Whether block lists are of use to later calls."""
        return bool(self.reuse or self.reuse_passes or self.hysteresis)

    def parts(self) -> Parts:
        """What is computed exactly, and what is done about the rest."""
        raise NotImplementedError(f"{type(self).__name__} does not implement parts")

    @property
    def compares_heads(self) -> bool:
        return self.parts().compares_heads

    def scheduled(self, position: Position) -> Self:
        """Sets how much is computed at a position, linear in the progress of the schedule."""
        start, progress = self.density_knob, position.progress
        end = getattr(self, f"{start}_end", None)
        if end is None or progress is None:
            return self
        share = round(getattr(self, start) * (1.0 - progress) + end * progress, 6)
        return replace(self, **{start: share, f"{start}_end": None})

    def shape_reason(self, layout: TokenLayout) -> str:
        if layout.visual is None:
            return COMPUTED_DENSELY
        orders = self.order_names
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
        orders, counts_forced = self.order_names, self.parts().budget.counts_forced
        each = [blocks_of(self, layout, _CPU, name).kept(counts_forced) for name in orders]
        kept = [share for share in each if share is not None]
        if len(kept) < len(each):
            return None
        return total_density(sum(kept) / len(kept), layout)

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> Exactness:
        memory, remembered = position.memory, None
        is_auto = self.order == AUTO
        if memory is not None and (is_auto or self._remembers):
            remembered = memory.of_call(position.step, kind_of(inputs))
        if not is_auto:
            return self.attend_blocks(inputs, position, out, remembered)

        def attend_in(order: str, out: Tensor, remembered: dict[str, Any] | None) -> Exactness:
            method = replace(self, order=order)
            return method.attend_blocks(inputs, position, out, remembered)

        if memory is None or remembered is None:
            return attend_in(CANDIDATES[0], out, None)
        known = memory.orders.get(kind_of(inputs))
        if known is None and position.progress is not None and position.progress < TRIED_FROM:
            known = CANDIDATES[0]
        if known is not None:
            return attend_in(known, out, remembered)
        order, exactness = attend_in_best_order(attend_in, inputs, self.block, out, remembered)
        memory.orders[kind_of(inputs)] = order
        return exactness

    def attend_blocks(
        self,
        inputs: AttentionInputs,
        position: Position,
        out: Tensor,
        remembered: dict[str, Any] | None,
    ) -> Exactness:
        """Attends with the visual queries in the order that is set.

        Args:
            inputs: The whole call.
            position: Where it stands.
            out: (B, N, H, D), the visual rows of the output, which are to be written.
            remembered: From earlier calls and for later ones; None where nothing is.

        Returns:
            How exactly they were answered.
        """
        device = inputs.query.device
        blocks = blocks_of(self, inputs.layout, device, self.order_of(position))
        visual, exact = in_order(inputs.visual(), blocks.order), inputs.exact()
        with torch.autocast(device.type, enabled=False):  # estimates stay fp32
            plan = self.plan(visual, exact, position, remembered)
            if plan.promise is not None and plan.density > KEPT_RATE.get(device.type, 1.0):
                out.copy_(inputs.dense_rows(inputs.layout.visual_slice))
                return Exactness(1.0, torch.zeros((), device=device), TOO_MUCH_FOR_PROMISE)
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
            output = corrector.finish(chosen, summary, KernelOutput(*attend(call)))
        out.index_copy_(1, blocks.order.order, output)
        kept = chosen.counts.float().mean() / blocks.number
        return Exactness(kept, None if plan.promise is None else plan.promise.error(output))

    def plan(
        self,
        visual: VisualTokens,
        exact: ExactTokens,
        position: Position,
        remembered: dict[str, Any] | None = None,
    ) -> BlockPlan:
        """Selects and corrects, some query blocks at a time to bound the memory.

        Args:
            visual: Visual tokens in block order.
            exact: What every query sees exactly.
            position: Where the call stands.
            remembered: Has the "selection" of an earlier call, and gets that of this one.
        """
        parts, device = self.parts(), visual.query.device
        blocks = blocks_of(self, visual.layout, device, self.order_of(position))
        earlier, is_reused = earlier_selection(
            remembered or {}, position.step, blocks.order.name, self.reuse, self.reuse_passes
        )
        is_tested = is_reused and visual.query.device.type == "cpu"
        needs = parts.corrector.needs
        if is_tested or not is_reused:
            needs = needs | parts.selector.needs
        statistics = summarise(
            StatisticsCall(
                visual.query, visual.key, visual.value, self.block, visual.valid, needs=needs
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
            max_count, fitted = blocks.max_count, {} if self.reuse or self.reuse_passes else None
            ask = parts.ask
            if parts.max_error is not None:
                promise = promised(call, parts, blocks.forced.mask, parts.max_error)
                ask = ask._replace(keep=promise.keep)
            choose = self._chooser(rows, blocks, ask, earlier)
        found = []
        for some in rows:
            kept = choose(some)
            lists = block_lists(kept, max_count)
            correction = parts.corrector.correct(some, kept) or (None, None)
            found.append((kept, *lists, *correction))
        kept, indices, counts, row_scale, row_bias = (
            found[0] if len(found) == 1 else _joined(found)
        )
        if remembered is not None and self._remembers and not is_reused:
            remembered["selection"] = Selection(
                kept, position.step, blocks.order.name, max_count, fitted
            )
        chosen = Chosen(call, indices, counts, fitted)
        summary = parts.corrector.summarise(chosen)
        return BlockPlan(chosen, row_scale, row_bias, summary, promise)

    def _chooser(
        self, rows: list[BlockRows], blocks: Blocks, ask: Ask, earlier: Selection | None
    ) -> Callable[[BlockRows], Tensor]:
        """Returns what says which blocks some of the rows compute, (B, H, R, NB) bool."""
        parts = self.parts()

        def scored(some: BlockRows) -> Scores:
            scores = parts.scores(some, blocks.forced.of(some.rows))
            if earlier is None or not self.hysteresis:
                return scores
            return steadied(scores, earlier.of(some), self.hysteresis)

        threshold, all_scores = None, None
        if parts.budget.looks_at_all_rows:
            sample = rows[0]
            if len(rows) > 1:
                sample = BlockRows(sample.call, slice(0, blocks.number, len(rows)))
            scores = scored(sample)
            threshold = parts.budget.threshold(scores, ask)
            all_scores = scores if len(rows) == 1 else None

        def choose(some: BlockRows) -> Tensor:
            scores = scored(some) if all_scores is None else all_scores
            kept = parts.kept(scores, ask, threshold)
            if parts.floor:
                kept = kept | with_mass(some.probability, parts.floor)
            return kept

        return choose


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
    share = None if parts.max_error is not None else parts.budget.share(number, parts.ask)
    if share is None and parts.max_error is None:
        share = parts.selector.share(order)
    max_count = parts.budget.max_count(number, forced.largest, parts.ask)
    if parts.floor or parts.selector.decides or parts.max_error is not None:
        max_count = number
    return Blocks(number, order, forced, share, max_count)


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
