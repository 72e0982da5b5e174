"""What the CPU path of block-sparse attention computes at a time: some heads of one sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.kernels.arguments import compute_dtype
from diffaccel.kernels.block_sparse.call import BlockSparseCall
from diffaccel.kernels.centroids import listed_blocks


@dataclass(slots=True)
class Slab:
    """Some heads of one sample: R = heads * NQ rows that draw from heads * NK key blocks.

    `query` (R, block_q, D) is scaled already, except for a fused softmax, which has `scale`; `key`
    and `value` are (heads * NK, block_k, D); `table` (R, max_count) int64 holds their block
    numbers; `widths` counts each row's key columns, less the padding of a ragged last block;
    `mask` (NK, block_k) and `extra_mask` (E,) are bool. With centroids, `moments` (heads, NK, D
    or 2D) holds what the query [and half its square] meets, `centroid_value` (heads, NK, D) the
    values, and `centroid_bias` (R, NK) the log counts, -inf for blocks in the list of the row.
    Of the columns of scores, the first `extra_width` are extra keys; `front_width` stand before
    those of the listed blocks.
    """

    heads: int
    scale: float
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    table: Tensor
    widths: list[int]
    extra_width: int = 0
    front_width: int = 0
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None
    extra_mask: Tensor | None = None
    moments: Tensor | None = None
    centroid_value: Tensor | None = None
    centroid_bias: Tensor | None = None

    def per_row(self, rows: list[int], *tensors: Tensor | None) -> list[Tensor | None]:
        """Returns what tensors (heads, ...) hold for the head of each row: (n, ...) each."""
        owner = None
        if self.heads > 1:
            owner = torch.tensor(rows) * self.heads // len(self.widths)
        found: list[Tensor | None] = []
        for tensor in tensors:
            if tensor is None:
                found.append(None)
            elif owner is None:
                found.append(tensor.expand(len(rows), *tensor.shape[1:]))
            else:
                found.append(tensor[owner])
        return found


def build_slab(call: BlockSparseCall, sample: int, some: slice, is_fused: bool) -> Slab:
    """Lays out the heads `some` of one sample.

    In fp32 at least with scaled queries, or, for a fused softmax, in the dtype of the query as
    they are.
    """
    mask, extra_mask = call.key_padding_mask, call.extra_padding_mask
    if mask is not None:  # one that hides nothing is dropped
        mask = None if bool(mask[sample].all()) else mask[sample]
    if extra_mask is not None:
        extra_mask = None if bool(extra_mask[sample].all()) else extra_mask[sample]
    indices, counts = call.indices[sample, some], call.counts[sample, some]
    keys, block_k, dtype = call.key.shape[1], call.block_k, compute_dtype(call.query)
    if is_fused:
        dtype = call.query.dtype
    table, widths = _block_table(indices, counts, keys, block_k)
    slab = Slab(
        heads=len(counts),
        scale=call.factor,
        query=_heads_first(call.query[sample, :, some], call.block_q, dtype),
        key=_heads_first(call.key[sample, :, some], block_k, dtype, mask),
        value=_heads_first(call.value[sample, :, some], block_k, dtype, mask),
        mask=None if mask is None else _block_mask(mask, block_k),
        table=table,
        widths=widths,
    )
    if not is_fused:
        slab.query.mul_(slab.scale)
    extra_key, extra_value, centroids = call.extra_key, call.extra_value, call.centroids
    if extra_key is not None and extra_value is not None and extra_key.shape[1]:
        extra = slab.extra_width = slab.front_width = extra_key.shape[1]
        slab.extra_key = _heads_first(extra_key[sample, :, some], extra, dtype, extra_mask)
        slab.extra_value = _heads_first(extra_value[sample, :, some], extra, dtype, extra_mask)
        slab.extra_mask = extra_mask
    if centroids is not None:
        slab.front_width += centroids.key.shape[2]
        slab.moments = centroids.key[sample, some].to(dtype)
        if centroids.variance is not None:
            slab.moments = torch.cat([slab.moments, centroids.variance[sample, some].to(dtype)], 2)
        slab.centroid_value = centroids.value[sample, some].to(dtype)
        slab.centroid_bias = _centroid_bias(
            centroids.log_count[sample, some].to(dtype), indices, counts
        )
    return slab


def _heads_first(
    tokens: Tensor, block: int, dtype: torch.dtype, mask: Tensor | None = None
) -> Tensor:
    """Copies (N, h, D) to blocks (h * ceil(N / block), block, D), zero where masked.

    Masked keys may hold NaN, which a weight of 0 would not remove.
    """
    length, heads, dim = tokens.shape
    number = -(-length // block)
    blocks = torch.empty(heads, number * block, dim, dtype=dtype)
    blocks[:, :length] = tokens.transpose(0, 1)
    blocks[:, length:] = 0.0
    if mask is not None:
        blocks[:, :length].masked_fill_(~mask.view(1, -1, 1), 0.0)
    return blocks.view(heads * number, block, dim)


def _block_mask(mask: Tensor, block: int) -> Tensor:
    """Reshapes a mask (M,) to (NK, block), False beyond M."""
    number = -(-len(mask) // block)
    return torch.nn.functional.pad(mask, (0, number * block - len(mask))).view(number, block)


def _block_table(
    indices: Tensor, counts: Tensor, keys: int, block_k: int
) -> tuple[Tensor, list[int]]:
    """Turns lists (h, NQ, max_count) into block numbers within a slab and widths of rows.

    Returns:
        (h * NQ, max_count) int64, and the key columns of each row: only a last block may be
        short, and is last.
    """
    heads = torch.arange(len(indices)).view(-1, 1, 1)
    is_listed = torch.arange(indices.shape[2]) < counts.unsqueeze(-1)
    table = indices.long().masked_fill(~is_listed, 0) + heads * -(-keys // block_k)
    if not indices.shape[2]:
        return table.flatten(0, 1), [0] * counts.numel()
    last = indices.gather(2, (counts.long() - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    short = -keys % block_k * (last == (keys - 1) // block_k)
    widths = (counts * block_k - short) * (counts > 0)
    return table.flatten(0, 1), widths.flatten().tolist()


def _centroid_bias(log_count: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Gives each row the log counts (h, NK) of its head, -inf for listed blocks: (h * NQ, NK)."""
    listed = listed_blocks(indices, counts, log_count.shape[1])
    return log_count.unsqueeze(1).masked_fill(listed, -torch.inf).flatten(0, 1)
