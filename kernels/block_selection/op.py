"""Selection: which key blocks a query block attends, from scores to ascending lists."""

from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.arguments import Numbers, Tensors, refuse_backward
from diffaccel.kernels.block_selection.call import SelectionCall, check
from diffaccel.kernels.block_selection.cpu import select_blocks_cpu


def select_blocks(
    scores: Tensor,
    top_k: int,
    *,
    p_remain: float = 0.0,
    text: Tensor | None = None,
    forced: Tensor | None = None,
    max_count: int | None = None,
    return_kept: bool = False,
) -> tuple[Tensor, ...]:
    """Lists the blocks with the largest scores of each row, for `block_sparse_attention`.

    A row (batch, head, query block) keeps its first `n` blocks in descending order of score,
    ties in ascending order of index, where `n` is `top_k` or, if that is more, the number of
    blocks that it takes for `text` and their scores to sum to more than `p_remain` (all blocks
    where they never do). Forced blocks are kept as well; blocks of score 0 never are. The choice
    is deterministic. Sums are fp32, so that one within rounding of `p_remain` may go either way.

    Args:
        scores: (B, H, R, NB) fp32, non-negative, any strides: for `p_remain`, probabilities that
            sum to at most 1 with `text`. NaN counts as the largest score, so that it stays visible
            in what attends the lists.
        top_k: Blocks per row, 1 to NB.
        p_remain: Mass to exceed, 0 to 1; 0 leaves `top_k` alone in charge.
        text: (B, H, R) fp32, mass that is computed anyway; None for 0. Only `p_remain` uses it.
        forced: (R, NB) bool, True for blocks to keep whatever their score, or None.
        max_count: Width of the lists, 1 to NB, at least the largest number of kept blocks; on
            CUDA longer rows lose their last blocks. None for the smallest that is always enough.
        return_kept: Whether to return the choice as a mask too.

    Returns:
        indices (B, H, R, max_count) int32, ascending up to the count of the row, then 0; and
        counts (B, H, R) int32. With `return_kept` also kept (B, H, R, NB) bool. No host
        synchronisation on CUDA.

    Raises:
        ValueError: If a shape or number does not fit, or, on the CPU, if a row keeps more than
            `max_count` blocks.
        TypeError: If a dtype does not fit.
    """
    call = SelectionCall(scores, top_k, p_remain, text, forced, max_count, return_kept)
    check(call)
    return select(call)


def select(call: SelectionCall) -> tuple[Tensor, ...]:
    """Runs a call whose arguments are known to fit: `select_blocks` without its checks."""
    indices, counts, kept = _select_blocks(
        call.scores,
        [call.text, call.forced, call.budgets],
        [call.top_k, call.width],
        float(call.p_remain),
        call.return_kept,
        call.backend or "",
    )
    return (indices, counts, kept) if call.return_kept else (indices, counts)


@torch.library.custom_op("diffaccel::select_blocks", mutates_args=())
def _select_blocks(
    scores: Tensor, rest: Tensors, sizes: Numbers, p_remain: float, return_kept: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the call again, and runs its backend; kept has size 0 unless it was asked for."""
    (text, forced, budgets), (top_k, max_count) = rest, sizes
    call = SelectionCall(scores, top_k, p_remain, text, forced, max_count, return_kept, budgets)
    if backend == "triton" or (scores.is_cuda and not backend):
        from diffaccel.kernels.block_selection.launch import select_blocks_triton

        return select_blocks_triton(call)
    return select_blocks_cpu(call)


@_select_blocks.register_fake
def _(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, (_, max_count), _, return_kept, _ = arguments
    rows = scores.shape[:3]
    return (
        scores.new_empty((*rows, max_count), dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty(scores.shape if return_kept else (0,), dtype=torch.bool),
    )


_select_blocks.register_autograd(refuse_backward("select_blocks"))
