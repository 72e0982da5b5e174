"""Neighborhood attention in Triton: the launcher, and how it chooses the boxes."""

import functools
import itertools
from dataclasses import dataclass
from math import ceil, prod

import torch
import triton
from torch import Tensor

from diffaccel.kernels.block_sparse.tiles import device_capability, tile_configs
from diffaccel.kernels.neighborhood.call import NeighborhoodCall
from diffaccel.kernels.neighborhood.kernel import neighborhood_fwd_kernel
from diffaccel.kernels.neighborhood.windows import Axis

Box = tuple[int, int, int]
# What the mask of a key box that not every query sees costs, in terms of the box itself.
_MASK_COST = 0.5


@dataclass(frozen=True, slots=True)
class BoxConfig:
    """How the kernel is launched: boxes of queries and keys, warps, pipeline stages."""

    query: Box
    key: Box
    num_warps: int
    num_stages: int


def neighborhood_triton(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Computes a call that was checked and suits it.

    Returns:
        The output in the shape of query, and the lse without the last dim, which has size 0
        unless it was asked for.
    """
    axes = (Axis(1, 1),) * (3 - len(call.axes)) + call.axes
    grid = tuple(axis.length for axis in axes)
    query, key, value = (_with_three_axes(x) for x in (call.query, call.key, call.value))
    batch, heads, dim = len(query), query.shape[-2], query.shape[-1]
    output = torch.empty(call.query.shape, dtype=query.dtype, device=query.device)
    lse_shape = output.shape[:-1] if call.return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=query.device)
    # an absent tensor is stood for by the query, which its constexpr flag keeps from being read
    extra, extra_key, extra_value, mask = 0, query[:, 0, 0], query[:, 0, 0], query
    if call.extra_key is not None and call.extra_value is not None and call.extra_key.shape[1]:
        extra = call.extra_key.shape[1]
        extra_key, extra_value = call.extra_key.contiguous(), call.extra_value.contiguous()
    has_mask = False
    if extra and call.extra_padding_mask is not None:
        has_mask, mask = True, call.extra_padding_mask.contiguous().view(torch.uint8)
    capability = device_capability(query.device)
    config = box_config(axes, dim, query.element_size(), capability)
    groups = [ceil(axis.length / axis.dilation) for axis in axes]
    tiles = prod(ceil(size / box) for size, box in zip(groups, config.query, strict=True))
    programs = tiles * prod(axis.dilation for axis in axes) * batch * heads

    with torch.cuda.device_of(query):
        neighborhood_fwd_kernel[(programs,)](
            query,
            key,
            value,
            output,
            lse if call.return_lse else query,
            extra_key,
            extra_value,
            mask,
            *query.stride()[:5],
            *key.stride()[:5],
            *value.stride()[:5],
            *extra_key.stride()[:3],
            *extra_value.stride()[:3],
            *grid,
            *(axis.kernel for axis in axes),
            *(axis.stride for axis in axes),
            *(axis.dilation for axis in axes),
            *(axis.phase for axis in axes),
            heads,
            heads // key.shape[-2],
            extra,
            call.factor * 1.4426950408889634,
            HEAD_DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            Q0=config.query[0],
            Q1=config.query[1],
            Q2=config.query[2],
            K0=config.key[0],
            K1=config.key[1],
            K2=config.key[2],
            CAUSAL0=axes[0].is_causal,
            CAUSAL1=axes[1].is_causal,
            CAUSAL2=axes[2].is_causal,
            TRUNCATED0=axes[0].is_truncated,
            TRUNCATED1=axes[1].is_truncated,
            TRUNCATED2=axes[2].is_truncated,
            HAS_EXTRA=extra > 0,
            HAS_EXTRA_MASK=has_mask,
            HAS_LSE=call.return_lse,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output, lse


@functools.lru_cache(maxsize=256)
def box_config(
    axes: tuple[Axis, ...], head_dim: int, element_size: int, capability: tuple[int, int]
) -> BoxConfig:
    """Chooses boxes that visit and mask few keys beyond the windows.

    Args:
        axes: Frames, height, width.
        head_dim: Head dim D, 1 to 256.
        element_size: Bytes per element, 2 or 4.
        capability: CUDA compute capability, (9, 0) for Hopper.
    """
    tile = tile_configs(128, 128, head_dim, element_size, capability)[0]

    def cost(boxes: tuple[Box, Box]) -> float:
        tiles, visited, full = 1, 1, 1
        for axis, queries, keys in zip(axes, *boxes, strict=True):
            length, spread = axis.group_length(0), queries - min(axis.stride, queries)
            if axis.stride % queries and axis.stride > 1:
                spread = ceil(queries / axis.stride) * axis.stride
            tiles *= ceil(length / queries)
            visited *= ceil(min(length, axis.kernel + spread) / keys)
            full *= max(0, axis.kernel - spread - (keys - 1 if spread else 0)) // keys
        return tiles * (visited + _MASK_COST * (visited - full))

    choices = itertools.product(_boxes(tile.block_m, axes), _boxes(tile.block_n, axes))
    query, key = min(choices, key=cost)
    return BoxConfig(query, key, tile.num_warps, tile.num_stages)


def _boxes(volume: int, axes: tuple[Axis, ...]) -> list[Box]:
    """All boxes of powers of two with a volume, none longer than twice its axis."""
    powers = [2**i for i in range(volume.bit_length())]
    sides = [[p for p in powers if p < 2 * axis.group_length(0)] or [1] for axis in axes]
    fitting = [box for box in itertools.product(*sides) if prod(box) == volume]
    return fitting or [(1, 1, volume)]


def _with_three_axes(tensor: Tensor) -> Tensor:
    """Puts axes of length 1 before the grid; copies only where the last dim is strided."""
    tensor = tensor[(slice(None),) + (None,) * (6 - tensor.dim())]
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
