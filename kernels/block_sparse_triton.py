"""Block-sparse attention in Triton: one program walks the index list of one query tile."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    config = tile_config(block_q, block_k, dim, query.element_size(), _capability(query.device))
    q_tiles = triton.cdiv(block_q, config.block_m)

    with torch.cuda.device_of(query):
        _block_sparse_fwd_kernel[(counts.shape[2] * q_tiles * batch * heads,)](
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
            HAS_KEY_MASK=key_padding_mask is not None,
            HAS_EXTRA=extra > 0,
            HAS_EXTRA_MASK=extra > 0 and extra_padding_mask is not None,
            HAS_ROW_SCALE=row_scale is not None,
            HAS_ROW_BIAS=row_bias is not None,
            HAS_LSE=return_lse,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output, lse


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How the kernel is launched: inner tile of queries and keys, warps, pipeline stages."""

    block_m: int
    block_n: int
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
    row_bytes = padded_dim * element_size
    is_datacenter = capability in ((9, 0), (10, 0), (10, 3))
    if element_size == 4:
        most_m, most_n = (64, 32) if padded_dim <= 128 else (32, 16)
    elif row_bytes > 256:
        most_m, most_n = (128, 64) if is_datacenter else (64, 32)
    elif is_datacenter:
        most_m, most_n = 128, 128
    else:
        most_m, most_n = (128, 64) if capability == (8, 0) else (64, 64)
    block_m = min(most_m, max(16, triton.next_power_of_2(block_q)))
    block_n = min(most_n, max(16, triton.next_power_of_2(block_k)))
    return TileConfig(block_m, block_n, num_warps=8 if block_m >= 128 else 4, num_stages=2)


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability; the interpreter, which has none, counts as (8, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flags(mask: Tensor | None, absent: Tensor) -> Tensor:
    return absent if mask is None else mask.contiguous().view(torch.uint8)


@triton.jit
def _block_sparse_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    key_mask_ptr,
    extra_k_ptr,
    extra_v_ptr,
    extra_mask_ptr,
    row_scale_ptr,
    row_bias_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ib,
    stride_ih,
    stride_iq,
    stride_cb,
    stride_ch,
    stride_cq,
    stride_ekb,
    stride_ekn,
    stride_ekh,
    stride_evb,
    stride_evn,
    stride_evh,
    heads,
    queries,
    keys,
    extra,
    max_count,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_EXTRA_MASK: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """One program computes BLOCK_M queries of one query block of one head."""
    Q_TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    K_TILES: tl.constexpr = (BLOCK_K + BLOCK_N - 1) // BLOCK_N
    q_blocks = tl.cdiv(queries, BLOCK_Q)
    key_blocks = tl.cdiv(keys, BLOCK_K)
    pid = tl.program_id(0)
    pid_tile = pid % (q_blocks * Q_TILES)
    pid_head = pid // (q_blocks * Q_TILES)
    block_q = pid_tile // Q_TILES
    off_b = (pid_head // heads).to(tl.int64)
    off_h = (pid_head % heads).to(tl.int64)

    in_block = (pid_tile % Q_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    off_n = block_q.to(tl.int64) * BLOCK_Q + in_block
    off_d = tl.arange(0, BLOCK_D)
    mask_d = off_d < HEAD_DIM
    mask_n = (in_block < BLOCK_Q) & (off_n < queries)
    mask_nd = mask_n[:, None] & mask_d[None, :]

    q_ptrs = q_ptr + off_b * stride_qb + off_h * stride_qh + off_n[:, None] * stride_qn
    q = tl.load(q_ptrs + off_d[None, :], mask=mask_nd, other=0.0)
    k_ptr += off_b * stride_kb + off_h * stride_kh
    v_ptr += off_b * stride_vb + off_h * stride_vh
    key_mask_ptr += off_b * keys
    indices_ptr += off_b * stride_ib + off_h * stride_ih + block_q.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + off_b * stride_cb + off_h * stride_ch + block_q * stride_cq)
    count = tl.minimum(tl.maximum(count, 0), max_count)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # lists ascend, so only the last block of a row can be the short one
    is_ragged = (BLOCK_K % BLOCK_N != 0) or HAS_KEY_MASK
    plain = 0
    if not is_ragged:
        plain = count
        if (keys % BLOCK_K != 0) & (count > 0):
            last = tl.load(indices_ptr + count - 1)
            plain = tl.where(last >= key_blocks - 1, count - 1, count)
        for i in range(0, plain * K_TILES):
            block = _clamp(tl.load(indices_ptr + i // K_TILES), key_blocks)
            start = block.to(tl.int64) * BLOCK_K + (i % K_TILES) * BLOCK_N
            in_tile = tl.arange(0, BLOCK_N)
            acc, peak, total = _attend_tile(
                acc, peak, total, q, k_ptr + start * stride_kn, v_ptr + start * stride_vn,
                stride_kn, stride_vn, in_tile, in_tile >= 0, off_d, mask_d, scale_log2,
                MASKED=False, EVEN_D=HEAD_DIM == BLOCK_D,
            )  # fmt: skip
    for i in range(plain * K_TILES, count * K_TILES):
        block = _clamp(tl.load(indices_ptr + i // K_TILES), key_blocks)
        in_tile = tl.arange(0, BLOCK_N)
        start = block.to(tl.int64) * BLOCK_K + (i % K_TILES) * BLOCK_N
        is_key = ((i % K_TILES) * BLOCK_N + in_tile < BLOCK_K) & (start + in_tile < keys)
        if HAS_KEY_MASK:
            is_key &= tl.load(key_mask_ptr + start + in_tile, mask=is_key, other=0) != 0
        acc, peak, total = _attend_tile(
            acc, peak, total, q, k_ptr + start * stride_kn, v_ptr + start * stride_vn,
            stride_kn, stride_vn, in_tile, is_key, off_d, mask_d, scale_log2,
            MASKED=True, EVEN_D=HEAD_DIM == BLOCK_D,
        )  # fmt: skip
    if HAS_EXTRA:
        extra_k_ptr += off_b * stride_ekb + off_h * stride_ekh
        extra_v_ptr += off_b * stride_evb + off_h * stride_evh
        for begin in range(0, extra, BLOCK_N):
            in_tile = tl.arange(0, BLOCK_N)
            is_key = begin + in_tile < extra
            if HAS_EXTRA_MASK:
                mask_ptrs = extra_mask_ptr + off_b * extra + begin + in_tile
                is_key &= tl.load(mask_ptrs, mask=is_key, other=0) != 0
            acc, peak, total = _attend_tile(
                acc, peak, total, q, extra_k_ptr, extra_v_ptr,
                stride_ekn, stride_evn, in_tile, is_key, off_d, mask_d, scale_log2,
                MASKED=True, EVEN_D=HEAD_DIM == BLOCK_D,
            )  # fmt: skip
            extra_k_ptr += BLOCK_N * stride_ekn
            extra_v_ptr += BLOCK_N * stride_evn

    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    off_row = pid_head.to(tl.int64) * q_blocks + block_q
    if HAS_ROW_SCALE:
        acc = acc * tl.load(row_scale_ptr + off_row)
    if HAS_ROW_BIAS:
        bias_ptrs = row_bias_ptr + off_row * HEAD_DIM + off_d
        acc = acc + tl.load(bias_ptrs, mask=mask_d, other=0.0)[None, :]
    off_token = (off_b * queries + off_n) * heads + off_h
    o_ptrs = o_ptr + off_token[:, None] * HEAD_DIM + off_d[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=mask_nd)
    if HAS_LSE:
        lse = tl.where(total > 0, (peak + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + off_token, lse, mask=mask_n)


@triton.jit
def _clamp(block, key_blocks):
    return tl.minimum(tl.maximum(block, 0), key_blocks - 1)


@triton.jit
def _attend_tile(
    acc,
    peak,
    total,
    q,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    in_tile,
    is_key,
    off_d,
    mask_d,
    scale_log2,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Adds BLOCK_N keys to the softmax state: acc (M, D), base-2 maximum peak and sum total (M,)."""
    k_ptrs = k_ptr + in_tile[None, :] * stride_kn + off_d[:, None]
    v_ptrs = v_ptr + in_tile[:, None] * stride_vn + off_d[None, :]
    if MASKED:
        k = tl.load(k_ptrs, mask=is_key[None, :] & mask_d[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=is_key[:, None] & mask_d[None, :], other=0.0)
    elif EVEN_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=mask_d[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=mask_d[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee")
    if MASKED:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    peak_new = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    # a row without any key so far has peak = -inf, and -inf - -inf is NaN
    pivot = tl.where(peak_new == float("-inf"), 0.0, peak_new)
    p = tl.exp2(scores * scale_log2 - pivot[:, None])
    alpha = tl.exp2(peak - pivot)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, peak_new, total
