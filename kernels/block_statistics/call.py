"""One call of block statistics: its arguments, what they must look like, and its result."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.arguments import MASK, check_tensor, check_tokens
from diffaccel.kernels.backends import check_backend

# the fields of `BlockStatistics` in its order, of size 0 where not asked for
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
OPTIONAL = (
    "value_mean",
    "query_spread",
    "key_spread",
    "query_variance",
    "key_variance",
    "value_deviation",
)
"""Fields of `BlockStatistics` that are computed where asked for, in its order."""
DEFAULT = frozenset({"value_mean", "query_spread", "key_spread"})
_LARGEST_TILE = 1 << 16  # tokens of a block that one Triton program holds


@dataclass(frozen=True, slots=True, eq=False)
class BlockStatistics:
    """What is known about each block of tokens.

    Args:
        query_mean: (B, H, NB, D) fp32, mean over the valid tokens of the block; 0 if none is.
        key_mean: (B, H, NB, D) fp32.
        value_mean: (B, H, NB, D) fp32, or None where not asked for.
        query_spread: (B, H, NB, D) fp32, mean absolute deviation per channel, or None.
        key_spread: (B, H, NB, D) fp32, or None.
        query_variance: (B, H, NB, D) fp32, variance per channel, or None. 0 where all tokens of
            the block are equal.
        key_variance: (B, H, NB, D) fp32, or None.
        value_deviation: (B, H, NB) fp32, root of the variance of the values summed over channels,
            that is, their root mean square distance from the mean; or None.
        counts: (B or 1, NB) fp32, valid tokens of each block; 0 for a fully padded one.
    """

    query_mean: Tensor
    key_mean: Tensor
    value_mean: Tensor | Any
    query_spread: Tensor | Any
    key_spread: Tensor | Any
    query_variance: Tensor | Any
    key_variance: Tensor | Any
    value_deviation: Tensor | Any
    counts: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks NB."""
        return self.key_mean.shape[2]


@dataclass(frozen=True, slots=True, eq=False)
class StatisticsCall:
    """The arguments of `diffaccel.kernels.block_statistics`, and two that few callers set.

    Args:
        needs: Which fields of `OPTIONAL` to compute.
        step_elements: Working memory of the CPU path in fp32 elements, at least 1, rounded up
            to one block of all heads. It bounds memory and decides speed, not the result; the
            default fits a cache. Triton needs no working memory.
        backend: "cpu", "triton", or None for the one that fits the device.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block: int
    valid: Tensor | None = None
    order: Tensor | None = None
    needs: frozenset[str] = DEFAULT
    step_elements: int = 1 << 20
    backend: str | None = None


def empty_parts(query: Tensor, block: int, has_valid: bool, needs: Collection[str]) -> Parts:
    """Returns memory for the statistics of tokens like `query`, in fp32."""
    batch, length, heads, channels = query.shape
    blocks = -(-length // block)

    def part(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    per_block = batch, heads, blocks, channels
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(OPTIONAL, per_block)
    shapes["value_deviation"] = per_block[:3]
    parts: Any = (part(*shape) if name in needs else part(0) for name, shape in shapes.items())
    return part(*per_block), part(*per_block), *parts, part(batch if has_valid else 1, blocks)


def check(call: StatisticsCall) -> None:
    """Checks everything that needs no tensor value.

    Raises:
        ValueError: If a shape, block size or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    query, valid, order = call.query, call.valid, call.order
    check_tokens(
        "block_statistics",
        query,
        call.key,
        call.value,
        fits=query.dim() == 4 and query.shape == call.key.shape == call.value.shape,
        rule="query, key and value must share one shape (B, N, H, D)",
        remedy="transpose heads-first tensors with .transpose(1, 2)",
    )
    if call.block < 1 or call.step_elements < 1:
        raise ValueError(
            f"block and step_elements must be at least 1, got block={call.block}, "
            f"step_elements={call.step_elements}; 128 tokens per block suit most GPUs"
        )
    if not call.needs <= set(OPTIONAL):
        raise ValueError(
            f"needs must name some of {', '.join(OPTIONAL)}, got "
            f"{', '.join(sorted(call.needs - set(OPTIONAL)))}; the other statistics always come"
        )
    batch, length = query.shape[:2]
    check_tensor("valid", valid, torch.bool, (batch, length), MASK)
    if order is not None and order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 or int64, got {order.dtype}; call .long()")
    if order is not None and tuple(order.shape) != (length,):
        raise ValueError(
            f"order must be (tokens,) = {(length,)}, got {tuple(order.shape)}; "
            "pass one permutation for all samples and heads"
        )
    tensors = {"query": query, "key": call.key, "value": call.value}
    check_backend(call.backend, tensors | {"valid": valid, "order": order})
    is_triton = call.backend == "triton" or (call.backend is None and query.is_cuda)
    if is_triton and min(call.block, length) > _LARGEST_TILE:
        raise ValueError(
            f"backend 'triton' takes blocks of up to {_LARGEST_TILE} tokens, got "
            f"block={call.block}; pass a smaller block"
        )


def check_order(order: Tensor) -> None:
    """Raises ValueError unless order (N,) is a permutation of 0 to N - 1."""
    expected = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort().values, expected):
        raise ValueError(
            f"order must hold each of 0 to {len(order) - 1} once, got {int(order.min())} to "
            f"{int(order.max())} with gaps or repeats; pass a permutation of the tokens"
        )
