"""The door of block-sparse attention: what its arguments must look like."""

import torch
from torch import Tensor

from diffaccel.kernels.backends import resolve_backend
from diffaccel.kernels.centroids import Centroids

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    scale: float | None,
    key_padding_mask: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_padding_mask: Tensor | None,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    centroids: Centroids | None,
    backend: str | None,
) -> str:
    """Checks everything that needs no tensor value, and names the backend to run.

    Raises:
        ValueError: If a shape, block size or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    _check_tokens(query, key, value)
    if block_q < 1 or block_k < 1:
        raise ValueError(
            f"block_q and block_k must be at least 1, got {block_q=}, {block_k=}; "
            "pass the block sizes that the lists were built for, for example 128"
        )
    if scale is not None and not scale > 0:
        raise ValueError(
            f"scale must be positive, got {scale=}; pass None for D ** -0.5, or negate the query"
        )
    batch, queries, heads, dim = query.shape
    query_blocks = -(-queries // block_q)
    _check_lists(indices, counts, (batch, heads, query_blocks), block_q)
    _check_mask("key_padding_mask", key_padding_mask, (batch, key.shape[1]))
    _check_extra(query, extra_key, extra_value, extra_padding_mask)
    _check_statistic("row_scale", row_scale, (batch, heads, query_blocks))
    _check_statistic("row_bias", row_bias, (batch, heads, query_blocks, dim))
    statistics = {
        f"centroids.{k}": x for k, x in (centroids._asdict() if centroids else {}).items()
    }
    key_blocks = -(-key.shape[1] // block_k)
    for name, tensor in statistics.items():
        is_count = name == "centroids.log_count"
        per_block = (batch, key_blocks) if is_count else (batch, heads, key_blocks, dim)
        _check_statistic(name, tensor, per_block)
    return resolve_backend(
        backend,
        query=query,
        key=key,
        value=value,
        indices=indices,
        counts=counts,
        key_padding_mask=key_padding_mask,
        extra_key=extra_key,
        extra_value=extra_value,
        extra_padding_mask=extra_padding_mask,
        row_scale=row_scale,
        row_bias=row_bias,
        **statistics,
    )


def check_entries(indices: Tensor, counts: Tensor, key_blocks: int) -> None:
    """Checks the values of the lists (B, H, NQ, max_count) and counts (B, H, NQ).

    Raises:
        ValueError: If a count is beyond the list, or a listed index is not ascending or not a
            key block.
    """
    max_count = indices.shape[-1]
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= max_count:
        raise ValueError(
            f"counts must lie between 0 and max_count={max_count}, got "
            f"{int(counts.min())} to {int(counts.max())}; lengthen indices or lower the counts"
        )
    is_listed = torch.arange(max_count) < counts.unsqueeze(-1)
    is_outside = is_listed & ((indices < 0) | (indices >= key_blocks))
    if is_outside.any():
        raise ValueError(
            f"indices must name key blocks 0 to {key_blocks - 1}, got "
            f"{int(indices[is_outside][0])}; check block_k and the number of keys"
        )
    if (is_listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])).any():
        raise ValueError(
            "indices must be strictly ascending within each row up to its count, got a row that "
            "is not; sort each row and drop duplicates"
        )


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be (B, N, H, D) and key and value (B, M, H, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
            "transpose heads-first tensors with .transpose(1, 2)"
        )
    batch, _, heads, dim = query.shape
    if (key.shape[0], key.shape[2], key.shape[3]) != (batch, heads, dim):
        raise ValueError(
            "query and key must share batch, heads and head dim, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}; repeat grouped key heads first"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(
            f"query and key must not be empty, got {tuple(query.shape)} and {tuple(key.shape)}; "
            "skip the call when there is nothing to attend"
        )
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must share one dtype of fp16, bf16 and fp32, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}; cast them to one dtype"
        )


def _check_lists(
    indices: Tensor, counts: Tensor, rows: tuple[int, int, int], block_q: int
) -> None:
    if indices.dtype != torch.int32 or counts.dtype != torch.int32:
        raise TypeError(
            f"indices and counts must be int32, got {indices.dtype} and {counts.dtype}; "
            "call .int() on them"
        )
    fits = indices.dim() == 4 and counts.dim() == 3
    for shape in (indices.shape[:3], counts.shape) if fits else ():
        fits &= shape[0] in (1, rows[0]) and shape[1] in (1, rows[1]) and shape[2] == rows[2]
    if not fits:
        raise ValueError(
            f"indices must be (B, H, NQ, max_count) and counts (B, H, NQ) with "
            f"(B, H, NQ)={rows} for {block_q=}, B and H may be 1, got {tuple(indices.shape)} and "
            f"{tuple(counts.shape)}; build the lists for this query and block_q"
        )


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True = attended, got {mask.dtype}; call .bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{name} must be (batch, keys) = {shape}, got {tuple(mask.shape)}; "
            "pass one row per sample"
        )


def _check_extra(
    query: Tensor, extra_key: Tensor | None, extra_value: Tensor | None, mask: Tensor | None
) -> None:
    if extra_key is None and extra_value is None and mask is None:
        return
    if extra_key is None or extra_value is None:
        raise ValueError(
            "extra_key and extra_value go together, and extra_padding_mask needs them, got "
            f"{extra_key is not None=}, {extra_value is not None=}; pass both or none"
        )
    batch, _, heads, dim = query.shape
    shape = (batch, extra_key.shape[1] if extra_key.dim() == 4 else -1, heads, dim)
    if tuple(extra_key.shape) != shape or extra_value.shape != extra_key.shape:
        raise ValueError(
            f"extra_key and extra_value must be (B, E, H, D) with query {tuple(query.shape)}, "
            f"got {tuple(extra_key.shape)} and {tuple(extra_value.shape)}; "
            "pass the text keys of the same heads"
        )
    if extra_key.dtype != query.dtype or extra_value.dtype != query.dtype:
        raise TypeError(
            f"extra_key and extra_value must have the dtype of query {query.dtype}, got "
            f"{extra_key.dtype} and {extra_value.dtype}; cast them"
        )
    _check_mask("extra_padding_mask", mask, shape[:2])


def _check_statistic(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be fp32, got {tensor.dtype}; call .float()")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape}, one entry per block, got {tuple(tensor.shape)}; "
            "build it for these tokens and this block size"
        )
