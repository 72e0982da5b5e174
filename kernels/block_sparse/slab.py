"""What the CPU path of block-sparse attention computes at a time: some heads of one sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.kernels.centroids import Centroids, listed_blocks


@dataclass(slots=True)
class Slab:
    """Some heads of one sample: R = heads * NQ rows that draw from heads * NK key blocks.

    `query` (R, block_q, D) is scaled; `key` and `value` are (heads * NK, block_k, D); `table`
    (R, max_count) int64 holds their block numbers; `widths` counts each row's key columns, less
    the padding of a ragged last block; `mask` (NK, block_k) and `extra_mask` (E,) are bool. With
    centroids, `moments` (heads, NK, D or 2D) holds what the query [and half its square] meets,
    `centroid_value` (heads, NK, D) the values, and `centroid_bias` (R, NK) the log counts, -inf
    for blocks in the list of the row.
    """

    heads: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    table: Tensor
    widths: list[int]
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None
    extra_mask: Tensor | None = None
    moments: Tensor | None = None
    centroid_value: Tensor | None = None
    centroid_bias: Tensor | None = None

    @property
    def extra_width(self) -> int:
        return 0 if self.extra_key is None else self.extra_key.shape[1]

    @property
    def front_width(self) -> int:
        """Columns of scores before those of the listed blocks: extra keys, then centroids."""
        centroids = 0 if self.moments is None else self.moments.shape[1]
        return self.extra_width + centroids

    def per_row(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Returns what a tensor (heads, ...) holds for the head of each row: (n, ...)."""
        if self.heads == 1:
            return tensor.expand(len(rows), *tensor.shape[1:])
        return tensor[torch.tensor(rows) * self.heads // len(self.widths)]


def build_slab(
    sample: int,
    some: slice,
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
    centroids: Centroids | None,
) -> Slab:
    """Lays out the heads `some` of one sample; the rest as in `block_sparse_attention`.

    In fp32 with scaled queries, or, without a scale, in the dtype of the query as they are.
    """
    mask, extra_mask = _mask_of(key_padding_mask, sample), _mask_of(extra_padding_mask, sample)
    indices, counts = indices[sample, some], counts[sample, some]
    keys = key.shape[1]
    dtype = query.dtype if scale is None else torch.float32
    slab = Slab(
        heads=len(counts),
        query=_heads_first(query[sample, :, some], block_q, dtype),
        key=_heads_first(key[sample, :, some], block_k, dtype, mask),
        value=_heads_first(value[sample, :, some], block_k, dtype, mask),
        mask=None if mask is None else _block_mask(mask, block_k),
        table=_block_table(indices, counts, -(-keys // block_k)),
        widths=_row_widths(indices, counts, keys, block_k),
    )
    if scale is not None:
        slab.query.mul_(scale)
    if extra_key is not None and extra_key.shape[1]:
        extra = extra_key.shape[1]
        slab.extra_key = _heads_first(extra_key[sample, :, some], extra, dtype, extra_mask)
        slab.extra_value = _heads_first(extra_value[sample, :, some], extra, dtype, extra_mask)
        slab.extra_mask = extra_mask
    if centroids is not None:
        slab.moments = centroids.key[sample, some]
        if centroids.variance is not None:
            slab.moments = torch.cat([slab.moments, centroids.variance[sample, some]], 2)
        slab.centroid_value = centroids.value[sample, some]
        slab.centroid_bias = _centroid_bias(centroids.log_count[sample], indices, counts)
    return slab


def _mask_of(masks: Tensor | None, sample: int) -> Tensor | None:
    """Returns the mask of one sample, or None where it hides nothing."""
    return None if masks is None or bool(masks[sample].all()) else masks[sample]


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


def _block_table(indices: Tensor, counts: Tensor, key_blocks: int) -> Tensor:
    """Turns lists (h, NQ, max_count) into block numbers (h * NQ, max_count) within a slab."""
    heads = torch.arange(len(indices)).view(-1, 1, 1)
    is_listed = torch.arange(indices.shape[2]) < counts.unsqueeze(-1)
    table = indices.long().masked_fill(~is_listed, 0) + heads * key_blocks
    return table.flatten(0, 1)


def _row_widths(indices: Tensor, counts: Tensor, keys: int, block_k: int) -> list[int]:
    """Counts the key columns of each row (h, NQ): only a last block may be short, and is last."""
    if not indices.shape[2]:
        return [0] * counts.numel()
    last = indices.gather(2, (counts.long() - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    short = -keys % block_k * (last == (keys - 1) // block_k)
    return ((counts * block_k - short) * (counts > 0)).flatten().tolist()


def _centroid_bias(log_count: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Returns log counts (h * NQ, NK), -inf for the blocks in the list of a row."""
    listed = listed_blocks(indices, counts, len(log_count))
    return log_count.masked_fill(listed, -torch.inf).flatten(0, 1)
