"""Block statistics: what estimators and correctors know about each run of tokens."""

from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from diffaccel.kernels.arguments import Flags, Numbers, Tensors, refuse_backward
from diffaccel.kernels.block_statistics.call import (
    BlockStatistics,
    Parts,
    StatisticsCall,
    check,
    check_order,
)
from diffaccel.kernels.block_statistics.cpu import block_statistics_cpu


class Needs(TypedDict, total=False):
    """Which statistics to compute beside the means of query and key."""

    needs_value: bool
    needs_spread: bool
    needs_variance: bool


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None = None,
    *,
    order: Tensor | None = None,
    **needs: Unpack[Needs],
) -> BlockStatistics:
    """Summarises runs of `block` tokens; the last run may be shorter.

    Deviations are those from the block's own mean, taken while its tokens are at hand, so that
    no precision is lost where the mean is large. On a GPU every token is read once. Inference
    only: there is no backward.

    Args:
        query: (B, N, H, D), fp16, bf16, fp32 or fp64 (summed in fp32), any strides.
        key: (B, N, H, D), dtype of `query`.
        value: (B, N, H, D), dtype of `query`.
        block: Tokens per block, at least 1. Powers of two up to 256 are fastest.
        valid: (B, N) bool, True for real tokens, in the order of the tensors. Padded tokens may
            hold anything, NaN included.
        order: (N,) int32 or int64 permutation: the token at position i of the runs is token
            `order[i]` of the tensors, which need not be copied into that order. None for the
            order they are in.
        **needs: `needs_value` (True by default) for value means, `needs_spread` (True) for the
            mean absolute deviations of query and key, `needs_variance` (False) for the variance
            of key.

    Returns:
        The statistics in fp32; what was not asked for is None.

    Raises:
        ValueError: If a shape, block size or order does not fit.
        TypeError: If a dtype does not fit.
    """
    call = StatisticsCall(query, key, value, block, valid, order, **needs)
    check(call)
    return summarise(call, has_checked_order=False)


def summarise(call: StatisticsCall, has_checked_order: bool = True) -> BlockStatistics:
    """Runs a call whose arguments are known to fit: `block_statistics` without its checks.

    Args:
        call: What `check` accepts.
        has_checked_order: Whether the order, too, is known to be a permutation. False checks
            that on the CPU.
    """
    rest = [call.key, call.value, call.valid, call.order]
    needs = [call.needs_value, call.needs_spread, call.needs_variance]
    query_mean, key_mean, value_mean, query_spread, key_spread, key_variance, counts = (
        _block_statistics(
            call.query,
            rest,
            [call.block, call.step_elements],
            needs,
            has_checked_order,
            call.backend or "",
        )
    )
    return BlockStatistics(
        query_mean,
        key_mean,
        value_mean if call.needs_value else None,
        query_spread if call.needs_spread else None,
        key_spread if call.needs_spread else None,
        key_variance if call.needs_variance else None,
        counts,
    )


@torch.library.custom_op("diffaccel::block_statistics", mutates_args=())
def _block_statistics(
    query: Tensor,
    rest: Tensors,
    sizes: Numbers,
    needs: Flags,
    has_checked_order: bool,
    backend: str,
) -> Parts:
    """Packs the call again, and runs its backend; what was not asked for has size 0."""
    key, value, valid, order = rest
    block, step_elements = sizes
    fields = (query, key, value, block, valid, order, *needs, step_elements)
    call = StatisticsCall(*cast(Any, fields))
    if not has_checked_order and order is not None and not order.is_cuda:
        check_order(order)  # on CUDA a host sync: the kernel clamps instead
    if backend == "triton" or (query.is_cuda and not backend):
        from diffaccel.kernels.block_statistics.launch import block_statistics_triton

        return block_statistics_triton(call)
    return block_statistics_cpu(call)


@_block_statistics.register_fake
def _(query: Tensor, *arguments: Any) -> Parts:
    (_, _, valid, _), (block, _), (needs_value, needs_spread, needs_variance), *_ = arguments
    batch, length, heads, channels = query.shape
    blocks = -(-length // block)

    def part(is_needed: bool) -> Tensor:
        shape = (batch, heads, blocks, channels) if is_needed else (0,)
        return query.new_empty(shape, dtype=torch.float32)

    counts = query.new_empty((1 if valid is None else batch, blocks), dtype=torch.float32)
    return (
        part(True),
        part(True),
        part(needs_value),
        part(needs_spread),
        part(needs_spread),
        part(needs_variance),
        counts,
    )


_block_statistics.register_autograd(refuse_backward("block_statistics"))
