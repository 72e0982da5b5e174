"""Block-sparse attention in Triton: the launcher."""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffaccel.kernels.autotune import fastest
from diffaccel.kernels.block_sparse.call import Attended, BlockSparseCall, empty_per_query
from diffaccel.kernels.block_sparse.kernel import block_sparse_fwd_kernel
from diffaccel.kernels.block_sparse.tiles import (
    TileConfig,
    device_capability,
    fits_descriptor,
    tile_configs,
)
from diffaccel.kernels.centroids import Centroids, listed_blocks


def block_sparse_triton(call: BlockSparseCall, config: TileConfig | None = None) -> Attended:
    """Computes a call that was checked.

    List entries are clamped to the existing key blocks, so that no list can make it read
    outside. `config` is how to launch; None for the fastest on this GPU.

    Returns:
        The output (B, N, H, D), the lse and the tail share (B, N, H), which have size 0 unless
        they were asked for.
    """
    if call.query.dtype == torch.float64:
        output, *numbers = block_sparse_triton(_narrowed(call), config)
        return output.double(), numbers[0], numbers[1]
    query, key, value, indices = map(
        _with_unit_stride, (call.query, call.key, call.value, call.indices)
    )
    counts, centroids, block_q, block_k = call.counts, call.centroids, call.block_q, call.block_k
    (batch, queries, heads, dim), keys = query.shape, key.shape[1]
    # an absent tensor is stood for by the query, which its constexpr flag keeps from being read
    extra, extra_key, extra_value = 0, query, query
    if call.extra_key is not None and call.extra_value is not None and call.extra_key.shape[1]:
        extra = call.extra_key.shape[1]
        extra_key, extra_value = map(_with_unit_stride, (call.extra_key, call.extra_value))
    summaries: tuple[Tensor, ...] = (query,) * 5
    if centroids is not None:
        summaries = _summaries(centroids, indices, counts, query.dtype)
    padded_dim = max(16, triton.next_power_of_2(dim))
    flags = {
        "HAS_KEY_MASK": call.key_padding_mask is not None,
        "HAS_EXTRA": extra > 0,
        "HAS_EXTRA_MASK": extra > 0 and call.extra_padding_mask is not None,
        "HAS_ROW_SCALE": call.row_scale is not None,
        "HAS_ROW_BIAS": call.row_bias is not None,
        "HAS_CENTROIDS": centroids is not None,
        "HAS_VARIANCE": centroids is not None and centroids.variance is not None,
        "HAS_LSE": call.return_lse,
        "HAS_TAIL": call.return_tail,
    }

    def launch(config: TileConfig) -> Attended:
        output = torch.empty((batch, queries, heads, dim), dtype=query.dtype, device=query.device)
        lse = empty_per_query(query, call.return_lse)
        tail = empty_per_query(query, call.return_tail)
        tile = [1, config.block_n, 1, padded_dim]
        descriptors = (
            TensorDescriptor.from_tensor(x, tile) if config.tma else None for x in (key, value)
        )
        q_tiles = triton.cdiv(block_q, config.block_m)
        block_sparse_fwd_kernel[(counts.shape[2] * q_tiles * batch * heads,)](
            query,
            key,
            value,
            *descriptors,
            output,
            lse if call.return_lse else query,
            tail if call.return_tail else query,
            indices,
            counts,
            _flags(call.key_padding_mask, query),
            extra_key,
            extra_value,
            _flags(call.extra_padding_mask, query),
            query if call.row_scale is None else call.row_scale.contiguous(),
            query if call.row_bias is None else call.row_bias.contiguous(),
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
            call.factor * 1.4426950408889634,
            HEAD_DIM=dim,
            BLOCK_D=padded_dim,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            HAS_TMA=config.tma,
            **flags,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return output, lse, tail

    with torch.cuda.device_of(query):
        if config is None:
            configs = _configs(query, key, value, block_q, block_k)
            size = queries.bit_length(), keys.bit_length()
            blocks = block_q, block_k
            problem = (query.device, query.dtype, dim, blocks, size, tuple(flags.values()))
            config = fastest(problem, configs, launch)
        return launch(config)


def _narrowed(call: BlockSparseCall) -> BlockSparseCall:
    """Returns a call with its tokens in fp32."""
    names = ("query", "key", "value", "extra_key", "extra_value")
    tokens: Any = {name: getattr(call, name) for name in names}
    narrow: Any = {name: None if x is None else x.float() for name, x in tokens.items()}
    return replace(call, **narrow)


def _configs(
    query: Tensor, key: Tensor, value: Tensor, block_q: int, block_k: int
) -> tuple[TileConfig, ...]:
    """The launches that suit the GPU and these tensors."""
    capability = device_capability(query.device)
    configs = tile_configs(block_q, block_k, query.shape[-1], query.element_size(), capability)
    if fits_descriptor(key) and fits_descriptor(value):
        return configs
    return tuple(config for config in configs if not config.tma)


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
