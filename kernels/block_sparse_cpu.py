"""Block-sparse attention on the CPU: gather the listed blocks, then batched dense attention.

Rows of equal length are computed together, in chunks that a byte budget bounds, so that memory
stays proportional to the kept blocks of one chunk. Where masks or the lse are wanted, which SDPA
lacks or does slowly, matrix products and a softmax take its place. All arithmetic is fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# gathered blocks of one SDPA call: each call is one parallel region, so that few barriers are left
# to wait at on a busy machine, where the products of small chunks took four times as long
_SDPA_BYTES = 64 << 20
# scores and gathered blocks of one chunk: more falls out of the cache (0.5 instead of 0.7 of the
# dense rate at 64 MiB a thread), less spends its time in the barriers of the thread pool
_CHUNK_BYTES_PER_THREAD = 8 << 20
# the rows of a chunk are padded to its longest, so a row shorter than this part opens a new one
_MIN_FILL = 0.875
# heads are computed together until they have this many rows, so that short rows fill a chunk
_SLAB_ROWS = 64


@torch.autocast("cpu", enabled=False)
def block_sparse_cpu(
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

    Returns:
        The output (B, N, H, D), and the lse (B, N, H), which has size 0 unless it was asked for.
    """
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    key_blocks, extra = -(-keys // block_k), 0 if extra_key is None else extra_key.shape[1]
    output = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty((batch, queries, heads) if return_lse else (0,), dtype=torch.float32)
    buffers = _Buffers()
    slab_heads = max(1, _SLAB_ROWS // counts.shape[2])
    for sample in range(batch):
        mask = _mask_of(key_padding_mask, sample)
        extra_mask = _mask_of(extra_padding_mask, sample)
        for head in range(0, heads, slab_heads):
            some = slice(head, head + slab_heads)
            slab = _Slab(
                query=_heads_first(query[sample, :, some], block_q).mul_(scale),
                key=_heads_first(key[sample, :, some], block_k, mask),
                value=_heads_first(value[sample, :, some], block_k, mask),
                mask=None if mask is None else _block_mask(mask, block_k),
                table=_block_table(indices[sample, some], counts[sample, some], key_blocks),
                widths=_row_widths(indices[sample, some], counts[sample, some], keys, block_k),
            )
            if extra:
                slab.extra_key = _heads_first(extra_key[sample, :, some], extra, extra_mask)
                slab.extra_value = _heads_first(extra_value[sample, :, some], extra, extra_mask)
                slab.extra_mask = extra_mask
            part, part_lse = _attend(slab, buffers, return_lse)
            if row_scale is not None:
                part.mul_(row_scale[sample, some].reshape(-1, 1, 1))
            if row_bias is not None:
                part.add_(row_bias[sample, some].flatten(0, 1).unsqueeze(1))
            part = part.view(-1, part.shape[1] * counts.shape[2], part.shape[2])
            output[sample, :, some] = part[:, :queries].transpose(0, 1)
            if return_lse:
                part_lse = part_lse.view(part.shape[:2])
                lse[sample, :, some] = part_lse[:, :queries].transpose(0, 1)
    return output, lse


@dataclass(slots=True)
class _Slab:
    """Some heads of one sample: R = heads * NQ rows that draw from heads * NK key blocks.

    `query` (R, block_q, D) is scaled; `key` and `value` are (heads * NK, block_k, D); `table`
    (R, max_count) int64 holds their block numbers; `widths` counts each row's key columns, less
    the padding of a ragged last block; `mask` (NK, block_k) and `extra_mask` (E,) are bool.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    table: Tensor
    widths: list[int]
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None
    extra_mask: Tensor | None = None

    @property
    def extra_width(self) -> int:
        return 0 if self.extra_key is None else self.extra_key.shape[1]


@dataclass(slots=True)
class _Buffers:
    """Scratch memory that the chunks share: fresh pages for each would cost half the time."""

    flat: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns uninitialised fp32 scratch, valid until the next take of this name."""
        size = prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = torch.empty(size, dtype=torch.float32)
        return self.flat[name][:size].view(shape)


def _attend(slab: _Slab, buffers: _Buffers, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Computes every row of a slab: output (R, block_q, D) and lse (R, block_q)."""
    output = torch.zeros_like(slab.query)
    lse = torch.full(slab.query.shape[:2] if with_lse else (0,), -torch.inf)
    is_plain = not with_lse and slab.mask is None and slab.extra_mask is None
    for rows in _chunks(slab, is_plain):
        if is_plain:
            part, part_lse = _attend_equal(slab, buffers, rows), None
        else:
            part, part_lse = _attend_chunk(slab, buffers, rows, with_lse)
        index = torch.tensor(rows)
        output.index_copy_(0, index, part)
        if part_lse is not None:
            lse.index_copy_(0, index, part_lse)
    return output, lse


def _chunks(slab: _Slab, is_plain: bool) -> Iterator[list[int]]:
    """Yields rows to compute together, longest first; rows without any key are left out.

    Rows of a plain chunk, for SDPA, have equal length; others are padded to the longest.
    """
    block_q, dim = slab.query.shape[1:]
    column_bytes = 4 * (2 * dim if is_plain else block_q + 2 * dim)
    chunk_bytes = _SDPA_BYTES if is_plain else _CHUNK_BYTES_PER_THREAD * torch.get_num_threads()
    min_fill = 1.0 if is_plain else _MIN_FILL
    chunk: list[int] = []
    longest = 0
    for row in sorted(range(len(slab.widths)), key=slab.widths.__getitem__, reverse=True):
        width = slab.widths[row] + slab.extra_width
        is_full = (len(chunk) + 1) * longest * column_bytes > chunk_bytes
        if chunk and (is_full or width < min_fill * longest):
            yield chunk
            chunk = []
        if not chunk:
            longest = width
        if width:
            chunk.append(row)
    if chunk:
        yield chunk


def _attend_equal(slab: _Slab, buffers: _Buffers, rows: list[int]) -> Tensor:
    """Computes rows of equal length without masks: (n, block_q, D)."""
    width = slab.widths[rows[0]]
    blocks = slab.table[rows, : -(-width // slab.key.shape[1])]
    key = _gather(buffers, "key", slab.key, blocks)[:, :width]
    value = _gather(buffers, "value", slab.value, blocks)[:, :width]
    if slab.extra_key is not None and slab.extra_value is not None:
        heads = _heads_of(slab, rows)
        shape = len(rows), slab.extra_width + width, key.shape[2]
        key = torch.cat([slab.extra_key[heads], key], 1, out=buffers.take("all keys", *shape))
        value = torch.cat(
            [slab.extra_value[heads], value], 1, out=buffers.take("all values", *shape)
        )
    output = scaled_dot_product_attention(
        slab.query[rows].unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), scale=1.0
    )
    return output.squeeze(1)


def _heads_of(slab: _Slab, rows: list[int]) -> Tensor:
    """Returns the head (n,) within the slab that each row belongs to."""
    number = 0 if slab.extra_key is None else len(slab.extra_key)
    return torch.tensor(rows) * number // len(slab.widths)


def _attend_chunk(
    slab: _Slab, buffers: _Buffers, rows: list[int], with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes some rows padded to the longest, which comes first: (n, block_q, D) and lse."""
    number, (_, block_k, dim), extra = len(rows), slab.key.shape, slab.extra_width
    block_q, width = slab.query.shape[1], slab.widths[rows[0]]
    blocks = slab.table[rows, : -(-width // block_k)]
    heads = _heads_of(slab, rows)
    query = slab.query[rows]

    scores = buffers.take("scores", number, block_q, extra + width)
    if slab.extra_key is not None:
        torch.bmm(query, slab.extra_key[heads].transpose(1, 2), out=scores[..., :extra])
    if width:
        key = _gather(buffers, "key", slab.key, blocks)[:, :width]
        torch.bmm(query, key.transpose(1, 2), out=scores[..., extra:])
    is_dead = _hide(slab, scores, rows, blocks)
    peak = scores.amax(dim=-1) if with_lse else None
    torch.softmax(scores, dim=-1, out=scores)

    output = torch.zeros(number, block_q, dim)
    if slab.extra_value is not None:
        torch.bmm(scores[..., :extra], slab.extra_value[heads], out=output)
    if width:
        output.baddbmm_(
            scores[..., extra:], _gather(buffers, "value", slab.value, blocks)[:, :width]
        )
    if is_dead is not None:
        output[is_dead] = 0.0
    if peak is None:
        return output, None
    # the largest weight of a row is 1 / sum(exp(score - peak))
    lse = peak - scores.amax(dim=-1).log_()
    if is_dead is not None:
        lse[is_dead] = -torch.inf
    return output, lse


def _gather(buffers: _Buffers, name: str, pool: Tensor, blocks: Tensor) -> Tensor:
    """Copies the blocks (n, count) of a pool together, to (n, count * block_k, D)."""
    gathered = buffers.take(name, blocks.numel(), *pool.shape[1:])
    torch.index_select(pool, 0, blocks.flatten(), out=gathered)
    return gathered.view(len(blocks), -1, pool.shape[2])


def _hide(slab: _Slab, scores: Tensor, rows: list[int], blocks: Tensor) -> Tensor | None:
    """Sets scores (n, block_q, columns) of padding to -inf; returns which rows (n,) lost all."""
    extra = slab.extra_width
    columns = scores.shape[2]
    for i, row in enumerate(rows):
        if extra + slab.widths[row] < columns:
            scores[i, :, extra + slab.widths[row] :] = -torch.inf
    if slab.mask is None and slab.extra_mask is None:
        return None
    is_kept = torch.ones(len(rows), columns, dtype=torch.bool)
    if slab.extra_mask is not None:
        is_kept[:, :extra] = slab.extra_mask
    if slab.mask is not None:
        is_kept[:, extra:] = slab.mask[blocks % len(slab.mask)].flatten(1)[:, : columns - extra]
    scores.masked_fill_(~is_kept.unsqueeze(1), -torch.inf)
    for i, row in enumerate(rows):
        is_kept[i, extra + slab.widths[row] :] = False
    return ~is_kept.any(dim=1)


def _mask_of(masks: Tensor | None, sample: int) -> Tensor | None:
    """Returns the mask of one sample, or None where it hides nothing."""
    return None if masks is None or bool(masks[sample].all()) else masks[sample]


def _heads_first(tokens: Tensor, block: int, mask: Tensor | None = None) -> Tensor:
    """Copies (N, h, D) to fp32 blocks (h * ceil(N / block), block, D), zero where masked.

    Masked keys may hold NaN, which a weight of 0 would not remove.
    """
    length, heads, dim = tokens.shape
    number = -(-length // block)
    blocks = torch.empty(heads, number * block, dim)
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
