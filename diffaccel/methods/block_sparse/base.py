"""The attention that all block-sparse methods share: order, estimate, select, correct, attend."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from diffaccel.kernels.block_sparse.call import BlockSparseCall
from diffaccel.kernels.block_sparse.op import attend
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.block_sparse.correctors.base import KernelOutput
from diffaccel.methods.block_sparse.order import CYCLES, ORDERS, in_order, orders_named
from diffaccel.methods.block_sparse.order_choice import (
    AUTO,
    CANDIDATES,
    TRIED_FROM,
    attend_in_best_order,
)
from diffaccel.methods.block_sparse.parts import Parts
from diffaccel.methods.block_sparse.plan import blocks_of, planned
from diffaccel.methods.block_sparse.reuse import kind_of
from diffaccel.methods.inputs import AttentionInputs, Position
from diffaccel.methods.visual import COMPUTED_DENSELY, Exactness, VisualMethod, total_density

if TYPE_CHECKING:
    from typing_extensions import Self

_CPU = torch.device("cpu")
KEPT_RATE = {"cpu": 0.65, "cuda": 0.75}
"""FLOP rate on kept blocks of 128 in terms of dense attention. The CPU's is measured at 16k
tokens (2 AVX2 cores, fp32); the GPU's is what published kernels reach, not measured here."""

ADDED_RATE = {"cpu": 0.5, "cuda": 0.5}
"""The same for what correctors add. The CPU's fits times at 4,096 to 16,384 tokens."""

CHOICE_TOKENS = {"cpu": 300.0, "cuda": 32.0}
"""Time of statistics, estimate and selection: that of dense attention with so many queries."""

LARGEST_DENSITY = {"cpu": 0.5, "cuda": 0.6}
"""Share of the blocks up to which it pays to compute them rather than all, summaries included."""

TOO_MUCH_FOR_PROMISE = "the promised error takes more blocks than dense attention is worth"


@dataclass(frozen=True, slots=True, repr=False)
class BlockSparseMethod(VisualMethod):
    """A selector and a corrector over blocks of visual tokens; text is always exact.

    Visual queries attend to the selected visual blocks and to all text and condition tokens.
    Text and condition queries run dense over everything. A subclass says what its selector and
    its corrector are.

    Args:
        p_remain: Share of the attention mass that is computed at least, 0 to 1; 0 leaves the
            number of blocks alone in charge.
        block: Tokens per block, a power of two of at least 16. None: 64 on a CPU, which errs
            less, 128 elsewhere, which is faster there.
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
    block: int | None = 128
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
        is_power = isinstance(block, int) and block >= 16 and not block & (block - 1)
        if block is not None and not is_power:
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

    def block_on(self, device: torch.device) -> int:
        """Tokens per block on a device."""
        return self.block or (64 if device.type == "cpu" else 128)

    @property
    def order_names(self) -> tuple[str, ...]:
        """Names of the orders that layers take in turn, keys of `ORDERS`."""
        return CANDIDATES[:1] if self.order == AUTO else orders_named(self.order)

    def order_of(self, position: Position) -> str:
        """Name of the order at a position, a key of `ORDERS`."""
        orders = self.order_names
        return orders[(position.layer or 0) % len(orders)]

    @property
    def remembers(self) -> bool:
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
        """Kept blocks over the rate on them, choosing them, and what is added for the others.

        A floor on the kept mass may keep more.
        """
        density = self.expected_density(layout)
        if self.shape_reason(layout) or density is None:
            return None
        kind = device if device in KEPT_RATE else "cpu"
        length, block = layout.visual.length, self.block_on(torch.device(device))
        added = self.parts().corrector.added_cost(length, block) / ADDED_RATE[kind]
        return density / KEPT_RATE[kind] + added + CHOICE_TOKENS[kind] / length

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
        if memory is not None and (is_auto or self.remembers):
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
        order, exactness = attend_in_best_order(
            attend_in, inputs, self.block_on(out.device), out, remembered
        )
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
            plan = planned(self, visual, exact, position, remembered)
            if plan.promise is not None and plan.density > LARGEST_DENSITY.get(device.type, 1.0):
                out.copy_(inputs.dense_rows(inputs.layout.visual_slice))
                return Exactness(1.0, torch.zeros((), device=device), TOO_MUCH_FOR_PROMISE)
            chosen, summary, corrector = plan.chosen, plan.summary, self.parts().corrector
            call = BlockSparseCall(
                visual.query,
                visual.key,
                visual.value,
                chosen.indices,
                chosen.counts,
                blocks.order.block,
                blocks.order.block,
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
