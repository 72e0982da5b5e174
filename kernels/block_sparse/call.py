"""One call of block-sparse attention: its arguments, and what they must look like."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.kernels.arguments import MASK, check_extra, check_tensor, check_tokens
from diffaccel.kernels.backends import check_backend
from diffaccel.kernels.centroids import Centroids

# the output (B, N, H, D), and lse and tail share, each (B, N, H) fp32 or of size 0
Attended = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BlockSparseCall:
    """The arguments of `diffaccel.kernels.block_sparse_attention`, which says what they mean.

    Every backend takes a call whole, with lists expanded to B and H; the oracle in
    `diffaccel.kernels.reference` takes any.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    scale: float | None = None
    key_padding_mask: Tensor | None = None
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None
    extra_padding_mask: Tensor | None = None
    row_scale: Tensor | None = None
    row_bias: Tensor | None = None
    centroids: Centroids | None = None
    return_lse: bool = False
    return_tail: bool = False
    backend: str | None = None

    @property
    def factor(self) -> float:
        """Factor on the scores."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale


def empty_per_query(query: Tensor, is_needed: bool) -> Tensor:
    """Returns fp32 memory for a number per query (B, N, H), of size 0 where not needed."""
    shape = query.shape[:3] if is_needed else (0,)
    return torch.empty(shape, dtype=torch.float32, device=query.device)


def check(call: BlockSparseCall) -> None:
    """Checks everything that needs no tensor value.

    Raises:
        ValueError: If a shape, block size or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    query, key = call.query, call.key
    fits = query.dim() == key.dim() == 4 and key.shape == call.value.shape
    check_tokens(
        "block_sparse_attention",
        query,
        key,
        call.value,
        fits=fits and (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:]),
        rule="query must be (B, N, H, D) and key and value (B, M, H, D) with the same batch, "
        "heads and head dim",
        remedy="transpose heads-first tensors with .transpose(1, 2), repeat grouped key heads",
    )
    if call.block_q < 1 or call.block_k < 1:
        raise ValueError(
            f"block_q and block_k must be at least 1, got block_q={call.block_q}, "
            f"block_k={call.block_k}; pass the block sizes that the lists were built for, for "
            "example 128"
        )
    if call.scale is not None and not call.scale > 0:
        raise ValueError(
            f"scale must be positive, got scale={call.scale}; pass None for D ** -0.5, or negate "
            "the query"
        )
    if call.return_tail and call.centroids is None:
        raise ValueError(
            "return_tail needs centroids, whose share of the softmax it returns, got "
            "centroids=None; pass centroids, or leave return_tail out"
        )
    batch, queries, heads, dim = query.shape
    keys = key.shape[1]
    rows = (batch, heads, -(-queries // call.block_q))
    _check_lists(call, rows)
    check_tensor("key_padding_mask", call.key_padding_mask, torch.bool, (batch, keys), MASK)
    check_extra(key, call.value, call.extra_key, call.extra_value, call.extra_padding_mask)
    statistics: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "row_scale": (call.row_scale, rows),
        "row_bias": (call.row_bias, (*rows, dim)),
    }
    if call.centroids is not None:
        blocks = -(-keys // call.block_k)
        per_block = (batch, heads, blocks, dim)
        statistics["centroids.key"] = call.centroids.key, per_block
        statistics["centroids.value"] = call.centroids.value, per_block
        statistics["centroids.log_count"] = call.centroids.log_count, per_block[:3]
        statistics["centroids.variance"] = call.centroids.variance, per_block
    tensors = {
        "query": query,
        "key": key,
        "value": call.value,
        "indices": call.indices,
        "counts": call.counts,
        "key_padding_mask": call.key_padding_mask,
        "extra_key": call.extra_key,
        "extra_value": call.extra_value,
        "extra_padding_mask": call.extra_padding_mask,
    }
    for name, (tensor, shape) in statistics.items():
        check_tensor(name, tensor, torch.float32, shape, "one entry per block")
        tensors[name] = tensor
    check_backend(call.backend, tensors)


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


def _check_lists(call: BlockSparseCall, rows: tuple[int, int, int]) -> None:
    indices, counts = call.indices, call.counts
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
            f"indices must be (B, H, NQ, max_count) and counts (B, H, NQ) with (B, H, NQ)={rows} "
            f"for block_q={call.block_q}, B and H may be 1, got {tuple(indices.shape)} and "
            f"{tuple(counts.shape)}; build the lists for this query and block_q"
        )
