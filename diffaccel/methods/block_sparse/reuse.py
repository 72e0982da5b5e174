"""Block lists of an earlier step: how long they serve, and whether they still do."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockRows
from diffaccel.methods.block_sparse.budgets import Scores
from diffaccel.methods.inputs import AttentionInputs

LARGEST_DRIFT = 0.1
SAMPLED_BLOCKS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What was selected in an earlier step. Holds one byte for each pair of blocks and head.

    Args:
        kept: (B, H, NB, NB) bool, which blocks each query block computes.
        step: When.
        order: Name of the order that the blocks are in.
        max_count: Blocks that a row keeps at most.
        fitted: What the corrector fits to sampled rows, None where nobody asks again.
    """

    kept: Tensor
    step: int | None
    order: str
    max_count: int
    fitted: dict[str, Tensor] | None

    def of(self, rows: BlockRows) -> Tensor:
        """What was kept for some query blocks, (B, H, R, NB) bool."""
        return self.kept[:, :, rows.rows]

    def age(self, step: int | None) -> float:
        """Steps since it was made, infinity where nobody knows."""
        return float("inf") if step is None or self.step is None else step - self.step


def kind_of(inputs: AttentionInputs) -> Hashable:
    """What calls must have in common for one's block lists to make sense for another."""
    query = inputs.query
    return inputs.layout, query.shape, query.dtype, query.device, inputs.first_head


def earlier_selection(
    remembered: dict[str, Any], step: int | None, order: str, reuse: int, is_shared: bool
) -> tuple[Selection | None, bool]:
    """Returns what was selected before, and whether it may serve a call as it is.

    Args:
        remembered: For the call, as `LayerMemory.of_call` gives it.
        step: Of the call.
        order: Of its blocks; a selection of others is none.
        reuse: For how many further steps a selection may serve.
        is_shared: Whether that of the first such call of the step may.
    """
    first = remembered.get("first", {}).get("selection") if is_shared else None
    if first is not None and first.order == order and 0 <= first.age(step) <= reuse:
        return first, True
    own = remembered.get("selection")
    if own is None or own.order != order:
        return None, False
    return own, 0 < own.age(step) <= reuse


def steadied(scores: Scores, earlier: Tensor, hysteresis: float) -> Scores:
    """Multiplies the scores of blocks that were kept before by 1 + hysteresis.

    Shares of the attention mass then sum to what they did.

    Args:
        scores: Of R query blocks.
        earlier: (B, H, R, NB) bool, which blocks they kept.
        hysteresis: At least 0.
    """
    blocks = torch.where(earlier, scores.blocks * (1.0 + hysteresis), scores.blocks)
    if scores.text is not None:
        before, after = (x.sum(-1, keepdim=True) for x in (scores.blocks, blocks))
        blocks = blocks * (before / after.clamp_min(1e-30)).nan_to_num(nan=1.0)
    return scores._replace(blocks=blocks)


def has_drifted(scores: Scores, kept: Tensor) -> bool:
    """Whether earlier lists miss what fresh ones of the same lengths would hold.

    They do where the score of the blocks in them falls short by more than `LARGEST_DRIFT`, or
    where they lack so large a share of those that are kept in any case. Waits for the device.

    Args:
        scores: Of R query blocks, now.
        kept: (B, H, R, NB) bool, what the lists hold of them.
    """
    blocks, always = scores.blocks, scores.always
    if not blocks.isfinite().all():  # tokens that are not finite, which must show
        return True
    if always is not None:
        always = always.expand(kept.shape)
        if (always & ~kept).sum() > LARGEST_DRIFT * always.sum():
            return True
        blocks, kept = blocks.masked_fill(always, 0.0), kept & ~always
    best = blocks.sort(-1, descending=True).values.cumsum(-1)
    last = kept.sum(-1, keepdim=True)
    best = best.gather(-1, (last - 1).clamp_min(0)).masked_fill(last == 0, 0.0)
    held = blocks.masked_fill(~kept, 0.0).sum(-1, keepdim=True)
    share = torch.where(best > 0, held / best, 1.0)
    return bool(share.mean() < 1.0 - LARGEST_DRIFT)
