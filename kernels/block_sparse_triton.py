"""Block-sparse attention in Triton: the launcher, and how it chooses tiles."""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from diffaccel.kernels.block_sparse_kernel import block_sparse_fwd_kernel
from diffaccel.kernels.centroids import Centroids, listed_blocks


def block_sparse_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    key_padding_mask: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_padding_mask: Tensor | None,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    centroids: Centroids | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Computes `diffaccel.kernels.block_sparse_attention`, whose arguments these are, checked.

    List entries are clamped to the existing key blocks, so that no list can make it read
    outside.

    Returns:
        The output (B, N, H, D), and the lse (B, N, H), which has size 0 unless it was asked for.
    """
    query, key, value, indices = map(_with_unit_stride, (query, key, value, indices))
    (batch, queries, heads, dim), keys = query.shape, key.shape[1]
    output = torch.empty((batch, queries, heads, dim), dtype=query.dtype, device=query.device)
    lse_shape = (batch, queries, heads) if return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=query.device)
    extra = 0 if extra_key is None else extra_key.shape[1]
    # an absent tensor is stood for by the query, which its constexpr flag keeps from being read
    extra_key = _with_unit_stride(extra_key if extra else query)
    extra_value = _with_unit_stride(extra_value if extra else query)
    summaries = (query,) * 5
    if centroids is not None:
        summaries = _summaries(centroids, indices, counts, query.dtype)
    config = tile_config(
        block_q, block_k, dim, query.element_size(), device_capability(query.device)
    )
    q_tiles = triton.cdiv(block_q, config.block_m)

    with torch.cuda.device_of(query):
        block_sparse_fwd_kernel[(counts.shape[2] * q_tiles * batch * heads,)](
            query,
            key,
            value,
            output,
            lse if return_lse else query,
            indices,
            counts,
            _flags(key_padding_mask, query),
            extra_key,
            extra_value,
            _flags(extra_padding_mask, query),
            query if row_scale is None else row_scale.contiguous(),
            query if row_bias is None else row_bias.contiguous(),
            *summaries,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *indices.stride()[:3],
            *counts.stride(),
            *extra_key.stride()[:3],
            *extra_value.stride()[:3],
            heads,
            queries,
            keys,
            extra,
            indices.shape[3],
            scale * 1.4426950408889634,
            HEAD_DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            HAS_KEY_MASK=key_padding_mask is not None,
            HAS_EXTRA=extra > 0,
            HAS_EXTRA_MASK=extra > 0 and extra_padding_mask is not None,
            HAS_ROW_SCALE=row_scale is not None,
            HAS_ROW_BIAS=row_bias is not None,
            HAS_CENTROIDS=centroids is not None,
            HAS_VARIANCE=centroids is not None and centroids.variance is not None,
            HAS_LSE=return_lse,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output, lse


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How the kernel is launched: tiles of queries, keys and centroids, warps, stages."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int


def tile_config(
    block_q: int, block_k: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> TileConfig:
    """Chooses the launch of the kernel so that it neither spills nor overflows shared memory.

    Args:
        block_q: Queries per block of the lists; the tile may be smaller.
        block_k: Keys per block of the lists; the tile may be smaller.
        head_dim: Head dim D, 1 to 256.
        element_size: Bytes per element, 2 or 4.
        capability: CUDA compute capability, (9, 0) for Hopper.
    """
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    is_datacenter = capability in ((9, 0), (10, 0), (10, 3))
    stages = 2
    if element_size == 4:
        most_m, most_n = (64, 32) if padded_dim <= 128 else (32, 16)
    elif padded_dim > 128:
        most_m, most_n = (128, 64) if is_datacenter else (64, 32)
    elif capability == (9, 0) and padded_dim <= 64:
        most_m, most_n = 128, 128
    elif is_datacenter:  # 128 keys spill 296 bytes on sm_90 and 1304 on sm_100, 64 none
        most_m, most_n, stages = 128, 64, 3
    else:
        most_m, most_n = (128, 64) if capability == (8, 0) else (64, 64)
    block_m = min(most_m, max(16, triton.next_power_of_2(block_q)))
    block_n = min(most_n, max(16, triton.next_power_of_2(block_k)))
    warps = 8 if block_m >= 128 else 4
    return TileConfig(block_m, block_n, min(block_n, 32), num_warps=warps, num_stages=stages)


@functools.lru_cache(maxsize=64)
def device_capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability; the interpreter, which has none, counts as (8, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _summaries(
    centroids: Centroids, indices: Tensor, counts: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Returns key, value, variance, log count, and which blocks are listed (B, H, NQ, NK) uint8.

    The products run in the dtype of the query, for the matrix units.
    """
    key, value, log_count, variance = centroids
    listed = listed_blocks(indices, counts, key.shape[2]).contiguous().view(torch.uint8)
    key, value = (x.to(dtype).contiguous() for x in (key, value))
    variance = key if variance is None else variance.to(dtype).contiguous()
    return key, value, variance, log_count.contiguous(), listed


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flags(mask: Tensor | None, absent: Tensor) -> Tensor:
    return absent if mask is None else mask.contiguous().view(torch.uint8)
