"""Block statistics: what estimators and correctors know about each run of tokens."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffaccel.kernels.backends import resolve_backend
from diffaccel.kernels.block_statistics.cpu import block_statistics_cpu, check_order

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_TILE = 1 << 16  # tokens of a block that one Triton program holds
# means of query, key and value, spreads of query and key, variance of key, counts
_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BlockStatistics:
    """What is known about each block of tokens.

    Args:
        query_mean: (B, H, NB, D) fp32, mean over the valid tokens of the block; 0 if none is.
        key_mean: (B, H, NB, D) fp32.
        value_mean: (B, H, NB, D) fp32, or None where not asked for.
        query_spread: (B, H, NB, D) fp32, mean absolute deviation per channel, or None.
        key_spread: (B, H, NB, D) fp32, or None.
        key_variance: (B, H, NB, D) fp32, variance per channel, or None.
        counts: (B or 1, NB) fp32, valid tokens of each block; 0 for a fully padded one.
    """

    query_mean: Tensor
    key_mean: Tensor
    value_mean: Tensor | None
    query_spread: Tensor | None
    key_spread: Tensor | None
    key_variance: Tensor | None
    counts: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks NB."""
        return self.key_mean.shape[2]


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None = None,
    *,
    order: Tensor | None = None,
    needs_value: bool = True,
    needs_spread: bool = True,
    needs_variance: bool = False,
    step_elements: int = 1 << 20,
    backend: Literal["cpu", "triton"] | None = None,
) -> BlockStatistics:
    """Summarises runs of `block` tokens; the last run may be shorter.

    Deviations are those from the block's own mean, taken while its tokens are at hand, so that
    no precision is lost where the mean is large. On a GPU every token is read once. Inference
    only: there is no backward.

    Args:
        query: (B, N, H, D), fp16, bf16 or fp32, any strides.
        key: (B, N, H, D), dtype of `query`.
        value: (B, N, H, D), dtype of `query`.
        block: Tokens per block, at least 1. Powers of two up to 256 are fastest.
        valid: (B, N) bool, True for real tokens, in the order of the tensors. Padded tokens may
            hold anything, NaN included.
        order: (N,) int32 or int64 permutation: the token at position i of the runs is token
            `order[i]` of the tensors, which need not be copied into that order. None for the
            order they are in.
        needs_value: Whether to compute value means.
        needs_spread: Whether to compute the mean absolute deviations of query and key.
        needs_variance: Whether to compute the variance of key.
        step_elements: Working memory of the CPU path in fp32 elements, at least 1, rounded up
            to one block of all heads. It bounds memory and decides speed, not the result; the
            default fits a cache. Triton needs no working memory.
        backend: "cpu", "triton", or None for the one that fits the device.

    Returns:
        The statistics in fp32; what was not asked for is None.

    Raises:
        ValueError: If a shape, block size, order or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    _check_tokens(query, key, value)
    _check_options(query, block, valid, order, step_elements)
    backend = resolve_backend(backend, query=query, key=key, value=value, valid=valid, order=order)
    if backend == "triton" and min(block, query.shape[1]) > _LARGEST_TILE:
        raise ValueError(
            f"backend 'triton' takes blocks of up to {_LARGEST_TILE} tokens, got {block=}; pass "
            "a smaller block"
        )
    query_mean, key_mean, value_mean, query_spread, key_spread, key_variance, counts = (
        _block_statistics(
            query, key, value, block, valid, order,
            needs_value, needs_spread, needs_variance, step_elements, backend,
        )
    )  # fmt: skip
    return BlockStatistics(
        query_mean,
        key_mean,
        value_mean if needs_value else None,
        query_spread if needs_spread else None,
        key_spread if needs_spread else None,
        key_variance if needs_variance else None,
        counts,
    )


@torch.library.custom_op("diffaccel::block_statistics", mutates_args=())
def _block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None,
    order: Tensor | None,
    needs_value: bool,
    needs_spread: bool,
    needs_variance: bool,
    step_elements: int,
    backend: str,
) -> _Parts:
    """Runs the backend behind the door; what was not asked for has size 0."""
    flags = {
        "needs_value": needs_value,
        "needs_spread": needs_spread,
        "needs_variance": needs_variance,
    }
    if order is not None and not order.is_cuda:  # on CUDA a host sync: the kernel clamps instead
        check_order(order)
    if backend == "triton":
        from diffaccel.kernels.block_statistics.launch import block_statistics_triton

        return block_statistics_triton(query, key, value, block, valid, order, **flags)
    return block_statistics_cpu(
        query, key, value, block, valid, order, **flags, step_elements=step_elements
    )


@_block_statistics.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None,
    order: Tensor | None,
    needs_value: bool,
    needs_spread: bool,
    needs_variance: bool,
    step_elements: int,
    backend: str,
) -> _Parts:
    batch, length, heads, channels = query.shape
    blocks = -(-length // block)

    def part(is_needed: bool) -> Tensor:
        shape = (batch, heads, blocks, channels) if is_needed else (0,)
        return query.new_empty(shape, dtype=torch.float32)

    counts = query.new_empty((1 if valid is None else batch, blocks), dtype=torch.float32)
    flags = (True, True, needs_value, needs_spread, needs_spread, needs_variance)
    return *map(part, flags), counts


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must share one shape (B, N, H, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
            "transpose heads-first tensors with .transpose(1, 2)"
        )
    if 0 in query.shape:
        raise ValueError(
            f"query, key and value must not be empty, got {tuple(query.shape)}; "
            "skip the call when there are no tokens"
        )
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must share one dtype of fp16, bf16 and fp32, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}; cast them to one dtype"
        )


def _check_options(
    query: Tensor, block: int, valid: Tensor | None, order: Tensor | None, step_elements: int
) -> None:
    if block < 1 or step_elements < 1:
        raise ValueError(
            f"block and step_elements must be at least 1, got {block=}, {step_elements=}; "
            "128 tokens per block suit most GPUs"
        )
    batch, length = query.shape[:2]
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, True = real token, got {valid.dtype}; call .bool()")
    if valid is not None and tuple(valid.shape) != (batch, length):
        raise ValueError(
            f"valid must be (batch, tokens) = {(batch, length)}, got {tuple(valid.shape)}; "
            "pass one row per sample"
        )
    if order is not None and order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 or int64, got {order.dtype}; call .long()")
    if order is not None and tuple(order.shape) != (length,):
        raise ValueError(
            f"order must be (tokens,) = {(length,)}, got {tuple(order.shape)}; "
            "pass one permutation for all samples and heads"
        )
