"""Block-sparse attention: every query block attends its own list of key blocks, exactly."""

from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffaccel.kernels.arguments import Flags, Numbers, Tensors, refuse_backward
from diffaccel.kernels.block_sparse.call import (
    Attended,
    BlockSparseCall,
    check,
    check_entries,
    empty_per_query,
)
from diffaccel.kernels.block_sparse.cpu import block_sparse_cpu
from diffaccel.kernels.centroids import Centroids


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_padding_mask: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    centroids: Centroids | None = None,
    return_lse: bool = False,
    return_tail: bool = False,
    backend: Literal["cpu", "triton"] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Computes attention of each query block over the key blocks in its list.

    Exact over the listed keys: softmax runs over the union of the listed blocks, the extra keys
    and, if given, the centroids of the blocks that are not listed. With NQ = ceil(N / block_q)
    and NK = ceil(M / block_k), the last block of either side may be shorter than the others.
    Inference only: there is no backward.

        o = softmax(scale * q @ k_kept.T) @ v_kept
        output = row_scale * o + row_bias

    Args:
        query: (B, N, H, D), fp16, bf16, fp32 or fp64, any strides. Of fp64, the products are fp64
            on a CPU; Triton computes them in fp32.
        key: (B, M, H, D), dtype of `query`.
        value: (B, M, H, D), dtype of `query`.
        indices: (B, H, NQ, max_count) int32 with 0 <= index < NK, strictly ascending in each
            row up to its count; entries beyond the count are ignored. B and H may be 1 to share
            one list.
        counts: (B, H, NQ) int32, listed blocks per query block, 0 to max_count; B and H may
            be 1.
        block_q: Queries per block, at least 1. Powers of two from 64 to 128 are fastest.
        block_k: Keys per block, at least 1.
        scale: Factor on the scores, positive; None for D ** -0.5.
        key_padding_mask: (B, M) bool, True where the key may be attended. Padded keys and values
            may hold anything, NaN included.
        extra_key: (B, E, H, D), keys that every query attends beside its list (text).
        extra_value: (B, E, H, D), the values of `extra_key`.
        extra_padding_mask: (B, E) bool, True where the extra key may be attended.
        row_scale: (B, H, NQ) fp32, factor on the output of each query block; None for 1.
        row_bias: (B, H, NQ, D) fp32, added to each output row of a query block; None for 0.
        centroids: Summaries of all NK key blocks. A query attends those of the blocks that its
            list leaves out; see `Centroids` for what this approximates.
        return_lse: Whether to return the lse too.
        return_tail: Whether to return the share of each softmax that goes to `centroids`, which
            it needs.
        backend: "cpu", "triton", or None for the one that fits the device.

    Returns:
        The output (B, N, H, D) in the dtype of `query`. With `return_lse` also the natural-log
        normaliser of the scaled scores, (B, N, H) fp32, which ignores `row_scale` and
        `row_bias`. A query without any key has output 0 before these two, and lse -inf. With
        `return_tail`, last, the weight of all centroids in the softmax of each query, (B, N, H)
        fp32 in 0 to 1, before these two as well; 0 for a query without any key.

    Raises:
        ValueError: If a shape, block size, list entry or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    call = BlockSparseCall(
        query, key, value, indices, counts, block_q, block_k, scale, key_padding_mask,
        extra_key, extra_value, extra_padding_mask, row_scale, row_bias, centroids,
        return_lse, return_tail, backend,
    )  # fmt: skip
    check(call)
    output, lse, tail = attend(call, has_checked_entries=False)
    found = (output, *([lse] if return_lse else []), *([tail] if return_tail else []))
    return found if len(found) > 1 else output


def attend(call: BlockSparseCall, has_checked_entries: bool = True) -> Attended:
    """Runs a call whose arguments are known to fit: `block_sparse_attention` without its checks.

    Args:
        call: What `check` accepts.
        has_checked_entries: Whether the entries of the lists are known to be right, too, as those
            of `select_blocks` are. False checks them on the CPU.

    Returns:
        The output, the lse and the tail share; the last two have size 0 unless the call asks for
        them.
    """
    batch, _, heads, _ = call.query.shape
    rest = [
        call.key,
        call.value,
        call.indices.expand(batch, heads, -1, -1),
        call.counts.expand(batch, heads, -1),
        call.key_padding_mask,
        call.extra_key,
        call.extra_value,
        call.extra_padding_mask,
        call.row_scale,
        call.row_bias,
        *(call.centroids or (None, None, None, None)),
    ]
    sizes = [call.block_q, call.block_k]
    flags = [call.return_lse, call.return_tail, has_checked_entries]
    scale, backend = float(call.factor), call.backend or ""
    return _block_sparse_attention(call.query, rest, sizes, scale, flags, backend)


@torch.library.custom_op("diffaccel::block_sparse_attention", mutates_args=())
def _block_sparse_attention(
    query: Tensor, rest: Tensors, sizes: Numbers, scale: float, flags: Flags, backend: str
) -> Attended:
    """Packs the call again, and runs its backend; the flags are lse, tail, checked entries."""
    centroids = None if rest[10] is None else Centroids(*cast(Any, rest[10:]))
    fields = (query, *rest[:4], *sizes, scale, *rest[4:10], centroids, *flags[:2])
    call = BlockSparseCall(*cast(Any, fields))
    if not flags[2] and not query.is_cuda:  # on CUDA a host sync: the kernel clamps instead
        check_entries(call.indices, call.counts, key_blocks=-(-call.key.shape[1] // sizes[1]))
    if backend == "triton" or (query.is_cuda and not backend):
        from diffaccel.kernels.block_sparse.launch import block_sparse_triton

        return block_sparse_triton(call)
    return block_sparse_cpu(call)


@_block_sparse_attention.register_fake
def _(query: Tensor, *rest: Any) -> Attended:
    has_lse, has_tail, _ = rest[3]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, empty_per_query(query, has_lse), empty_per_query(query, has_tail)


_block_sparse_attention.register_autograd(refuse_backward("block_sparse_attention"))
