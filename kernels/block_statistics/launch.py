"""Block statistics in Triton: the launcher, and how it chooses tiles."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton

from diffaccel.kernels.block_statistics.call import OPTIONAL, Parts, StatisticsCall, empty_parts
from diffaccel.kernels.block_statistics.kernel import block_statistics_kernel


def block_statistics_triton(call: StatisticsCall) -> Parts:
    """Computes a call that was checked.

    Entries of `order` are clamped to the existing tokens, so that none can make it read outside.

    Returns:
        The tensors of `BlockStatistics` in its order; those not asked for have size 0.
    """
    query, key, value = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (call.query, call.key, call.value)
    )
    block, valid, order = call.block, call.valid, call.order
    batch, tokens, heads, channels = query.shape
    blocks = triton.cdiv(tokens, block)
    *parts, deviation, counts = empty_parts(query, block, valid is not None, call.needs)
    tile = tile_config(block, tokens, channels)
    channel_tiles = triton.cdiv(channels, tile.block_d)
    # a program sees some channels of a block, whose shares of the deviation are added afterwards
    squares = deviation
    if deviation.numel():
        squares = deviation.new_empty((*deviation.shape, channel_tiles))
    grid = (channel_tiles * heads * blocks * batch,)
    with torch.cuda.device_of(query):
        block_statistics_kernel[grid](
            query,
            key,
            value,
            # an absent tensor is stood for by the query, which its flag keeps from being read
            query if valid is None else valid.contiguous().view(torch.uint8),
            query if order is None else order.contiguous(),
            *parts,
            squares,
            counts,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            heads,
            tokens,
            blocks,
            HEAD_DIM=channels,
            BLOCK=block,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            HAS_VALID=valid is not None,
            HAS_ORDER=order is not None,
            **{f"HAS_{name.upper()}": name in call.needs for name in OPTIONAL},
            num_warps=tile.num_warps,
        )
    if deviation.numel():
        torch.sum(squares, -1, out=deviation).sqrt_()
    return cast(Any, (*parts, deviation, counts))


@dataclass(frozen=True, slots=True)
class StatisticsTile:
    """How the kernel is launched: tokens and channels that a program holds, and its warps."""

    block_n: int
    block_d: int
    num_warps: int


def tile_config(block: int, tokens: int, head_dim: int) -> StatisticsTile:
    """Chooses a tile that holds a whole block in registers, 32 elements per thread.

    At 64 per thread sm_90 spills, at 32 three programs fit a multiprocessor.

    Args:
        block: Tokens per block.
        tokens: Number of tokens N.
        head_dim: Head dim D; channels are independent, so large blocks take fewer at a time.
    """
    block_n = max(16, triton.next_power_of_2(min(block, tokens)))
    block_d = min(triton.next_power_of_2(head_dim), max(1, 8192 // block_n))
    warps = min(16, max(1, block_n * block_d // 1024))
    return StatisticsTile(block_n, block_d, num_warps=warps)
