"""Selection: which key blocks a query block attends, from scores to ascending lists."""

from typing import Literal

import torch
from torch import Tensor

from diffaccel.kernels.backends import resolve_backend
from diffaccel.kernels.block_selection.cpu import select_blocks_cpu


def select_blocks(
    scores: Tensor,
    top_k: int,
    *,
    p_remain: float = 0.0,
    text: Tensor | None = None,
    forced: Tensor | None = None,
    budgets: Tensor | None = None,
    max_count: int | None = None,
    return_kept: bool = False,
    backend: Literal["cpu", "triton"] | None = None,
) -> tuple[Tensor, ...]:
    """Lists the blocks with the largest scores of each row, for `block_sparse_attention`.

    A row (batch, head, query block) keeps its first `n` blocks in descending order of score,
    ties in ascending order of index, where `n` is `top_k` or, if that is more, the number of
    blocks that it takes for `text` and their scores to sum to more than `p_remain` (all blocks
    where they never do). Forced blocks are kept as well; blocks of score 0 never are. The choice
    is deterministic. Sums are fp32, so that one within rounding of `p_remain` may go either way.

    Args:
        scores: (B, H, R, NB) fp32, non-negative, any strides: for `p_remain`, probabilities that
            sum to at most 1 with `text`. NaN counts as no score, and leaves what else its row
            keeps open.
        top_k: Blocks per row, 1 to NB.
        p_remain: Mass to exceed, 0 to 1; 0 leaves `top_k` alone in charge.
        text: (B, H, R) fp32, mass that is computed anyway; None for 0. Only `p_remain` uses it.
        forced: (R, NB) bool, True for blocks to keep whatever their score, or None.
        budgets: (B, H) int32, blocks per row of each head in place of `top_k`, which they are
            clamped to (1 to `top_k`); B may be 1. None for `top_k` in every head.
        max_count: Width of the lists, 1 to NB, at least the largest number of kept blocks; on
            CUDA longer rows lose their last blocks. None for the smallest that is always enough.
        return_kept: Whether to return the choice as a mask too.
        backend: "cpu", "triton", or None for the one that fits the device.

    Returns:
        indices (B, H, R, max_count) int32, ascending up to the count of the row, then 0; and
        counts (B, H, R) int32. With `return_kept` also kept (B, H, R, NB) bool. No host
        synchronisation on CUDA.

    Raises:
        ValueError: If a shape, number or the backend does not fit, or, on the CPU, if a row
            keeps more than `max_count` blocks.
        TypeError: If a dtype does not fit.
    """
    _check_tensors(scores, text, forced, budgets)
    blocks = scores.shape[-1]
    if max_count is None:
        max_count = top_k if forced is None and p_remain == 0 else blocks
    _check_numbers(blocks, top_k, p_remain, max_count)
    backend = resolve_backend(backend, scores=scores, text=text, forced=forced, budgets=budgets)
    indices, counts, kept = _select_blocks(
        scores, text, forced, budgets, top_k, float(p_remain), max_count, return_kept, backend
    )
    return (indices, counts, kept) if return_kept else (indices, counts)


@torch.library.custom_op("diffaccel::select_blocks", mutates_args=())
def _select_blocks(
    scores: Tensor,
    text: Tensor | None,
    forced: Tensor | None,
    budgets: Tensor | None,
    top_k: int,
    p_remain: float,
    max_count: int,
    return_kept: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backend behind the door; kept has size 0 unless it was asked for."""
    run = select_blocks_cpu
    if backend == "triton":
        from diffaccel.kernels.block_selection.launch import select_blocks_triton as run

    return run(scores, text, forced, budgets, top_k, p_remain, max_count, return_kept)


@_select_blocks.register_fake
def _(
    scores: Tensor,
    text: Tensor | None,
    forced: Tensor | None,
    budgets: Tensor | None,
    top_k: int,
    p_remain: float,
    max_count: int,
    return_kept: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = scores.shape[:3]
    return (
        scores.new_empty((*rows, max_count), dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty(scores.shape if return_kept else (0,), dtype=torch.bool),
    )


def _check_tensors(
    scores: Tensor, text: Tensor | None, forced: Tensor | None, budgets: Tensor | None
) -> None:
    if scores.dim() != 4 or 0 in scores.shape:
        raise ValueError(
            f"scores must be (B, H, R, NB) and not empty, got {tuple(scores.shape)}; "
            "pass one score per query block and key block"
        )
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be fp32, since others tie, got {scores.dtype}")
    if text is not None and text.dtype != torch.float32:
        raise TypeError(f"text must be fp32, got {text.dtype}; call .float()")
    if text is not None and text.shape != scores.shape[:3]:
        raise ValueError(
            f"text must be (B, H, R) = {tuple(scores.shape[:3])}, got {tuple(text.shape)}; "
            "pass the summed mass of all text tokens of each row"
        )
    if forced is not None and forced.dtype != torch.bool:
        raise TypeError(f"forced must be bool, True = keep, got {forced.dtype}; call .bool()")
    if forced is not None and forced.shape != scores.shape[2:]:
        raise ValueError(
            f"forced must be (R, NB) = {tuple(scores.shape[2:])}, got {tuple(forced.shape)}; "
            "pass the rows that scores has"
        )
    if budgets is not None and budgets.dtype != torch.int32:
        raise TypeError(f"budgets must be int32, blocks per row, got {budgets.dtype}; call .int()")
    if budgets is not None and budgets.shape not in (scores.shape[:2], (1, scores.shape[1])):
        raise ValueError(
            f"budgets must be (B, H) = {tuple(scores.shape[:2])} or (1, H), got "
            f"{tuple(budgets.shape)}; pass one number per head"
        )


def _check_numbers(blocks: int, top_k: int, p_remain: float, max_count: int) -> None:
    if not 1 <= top_k <= blocks:
        raise ValueError(f"top_k must lie in 1 to NB={blocks}, got {top_k=}; clamp it")
    if not 0.0 <= p_remain <= 1.0:
        raise ValueError(
            f"p_remain must lie in 0 to 1, got {p_remain=}; it is the share of the attention "
            "mass that is kept at least, 0 to switch it off"
        )
    if not 1 <= max_count <= blocks:
        raise ValueError(
            f"max_count must lie in 1 to NB={blocks}, got {max_count=}; pass None for the "
            "smallest that is always enough"
        )
