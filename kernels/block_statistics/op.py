"""Block statistics: what estimators and correctors know about each run of tokens."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from diffaccel.kernels.arguments import Flags, Numbers, Tensors, refuse_backward
from diffaccel.kernels.block_statistics.call import (
    DEFAULT,
    OPTIONAL,
    BlockStatistics,
    Parts,
    StatisticsCall,
    check,
    check_order,
    empty_parts,
)
from diffaccel.kernels.block_statistics.cpu import block_statistics_cpu


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None = None,
    *,
    order: Tensor | None = None,
    needs: Iterable[str] = DEFAULT,
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
        needs: Which fields of the result to compute beside counts and the means of query and
            key: some of "value_mean", "query_spread", "key_spread", "query_variance",
            "key_variance" and "value_deviation". By default the first three.

    Returns:
        The statistics in fp32; what was not asked for is None.

    Raises:
        ValueError: If a shape, block size, order or name does not fit.
        TypeError: If a dtype does not fit.
    """
    call = StatisticsCall(query, key, value, block, valid, order, frozenset(needs))
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
    needs = [name in call.needs for name in OPTIONAL]
    sizes, backend = [call.block, call.step_elements], call.backend or ""
    query_mean, key_mean, *parts, counts = _block_statistics(
        call.query, rest, sizes, needs, has_checked_order, backend
    )
    asked = (part if is_asked else None for part, is_asked in zip(parts, needs, strict=True))
    fields: Any = (query_mean, key_mean, *asked, counts)
    return BlockStatistics(*fields)


@torch.library.custom_op("diffaccel::block_statistics", mutates_args=())
def _block_statistics(
    query: Tensor,
    rest: Tensors,
    sizes: Numbers,
    needs: Flags,
    has_checked_order: bool,
    backend: str,
) -> Parts:
    """Packs the call again, and runs its backend; `needs` has a flag for each of `OPTIONAL`."""
    key, value, valid, order = rest
    block, step_elements = sizes
    names = frozenset(name for name, is_asked in zip(OPTIONAL, needs, strict=True) if is_asked)
    fields = (query, key, value, block, valid, order, names, step_elements)
    call = StatisticsCall(*cast(Any, fields))
    if not has_checked_order and order is not None and not order.is_cuda:
        check_order(order)  # on CUDA a host sync: the kernel clamps instead
    if backend == "triton" or (query.is_cuda and not backend):
        from diffaccel.kernels.block_statistics.launch import block_statistics_triton

        return block_statistics_triton(call)
    return block_statistics_cpu(call)


@_block_statistics.register_fake
def _(query: Tensor, *arguments: Any) -> Parts:
    (_, _, valid, _), (block, _), needs, *_ = arguments
    names = [name for name, is_asked in zip(OPTIONAL, needs, strict=True) if is_asked]
    return empty_parts(query, block, valid is not None, names)


_block_statistics.register_autograd(refuse_backward("block_statistics"))
