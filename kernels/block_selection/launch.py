"""Selection of blocks in Triton: the launcher."""

from typing import Any

import torch
import triton
from torch import Tensor

from diffaccel.kernels.block_selection.call import SelectionCall
from diffaccel.kernels.block_selection.kernel import select_blocks_kernel


def select_blocks_triton(call: SelectionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call that was checked.

    Returns:
        indices, counts and kept, which has size 0 unless it was asked for.
    """
    scores = call.scores if call.scores.stride(-1) == 1 else call.scores.contiguous()
    text, forced, budgets, max_count = call.text, call.forced, call.budgets, call.width
    batch, heads, rows, blocks = scores.shape
    shared: dict[str, Any] = {"dtype": torch.int32, "device": scores.device}
    indices = torch.empty((batch, heads, rows, max_count), **shared)
    counts = torch.empty((batch, heads, rows), **shared)
    kept_shape = scores.shape if call.return_kept else (0,)
    kept = torch.empty(kept_shape, dtype=torch.bool, device=scores.device)
    with torch.cuda.device_of(scores):
        select_blocks_kernel[(batch * heads * rows,)](
            scores,
            # an absent tensor is stood for by the scores, which its flag keeps from being read
            scores if text is None else text,
            scores if forced is None else forced.contiguous().view(torch.uint8),
            counts if budgets is None else budgets,
            indices,
            counts,
            kept.view(torch.uint8),
            *scores.stride()[:3],
            *(scores.stride()[:3] if text is None else text.stride()),
            *((0, 0) if budgets is None else budgets.expand(batch, heads).stride()),
            heads,
            rows,
            blocks,
            call.top_k,
            max_count,
            call.p_remain,
            BLOCK=row_width(blocks),
            HAS_MASS=call.p_remain > 0,
            HAS_TEXT=text is not None,
            HAS_FORCED=forced is not None,
            HAS_BUDGETS=budgets is not None,
            HAS_KEPT=call.return_kept,
            num_warps=row_warps(blocks),
        )
    return indices, counts, kept


def row_width(blocks: int) -> int:
    """Scores that a program holds: a power of two, at least the blocks of a row."""
    return max(32, triton.next_power_of_2(blocks))


def row_warps(blocks: int) -> int:
    """Warps per program: one up to 1024 blocks, so that its sums need no barrier, then more."""
    return min(16, max(1, row_width(blocks) // 1024))
