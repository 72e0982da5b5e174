"""Block-sparse attention on the CPU: gather the listed blocks, then batched matrix products.

Rows of about equal length are computed together, in chunks that a byte budget bounds, so that
memory stays proportional to the kept blocks of one chunk. A softmax between two batched products
serves masks, centroids and the lse too, at the speed of SDPA on the gathered blocks (0.63 to 0.77
of the dense rate, SDPA 0.54 to 0.74). All arithmetic is fp32 (fp64 for fp64), but for bf16 on
processors with AMX units: those multiply bf16 several times faster, and SDPA keeps their sums in
fp32.
"""

import functools

import torch
from torch import Tensor

from diffaccel.kernels.arguments import compute_dtype
from diffaccel.kernels.block_sparse.call import Attended, BlockSparseCall, empty_per_query
from diffaccel.kernels.block_sparse.slab import Slab, build_slab
from diffaccel.kernels.scratch import Scratch

# scores and gathered blocks of one chunk: more falls out of the cache (0.5 instead of 0.7 of the
# dense rate at 64 MiB a thread), less spends its time in the barriers of the thread pool
_CHUNK_BYTES_PER_THREAD = 8 << 20
# the rows of a chunk are padded to its longest, so a row shorter than this part opens a new one
_MIN_FILL = 0.875
# heads are computed together until they have this many rows, so that short rows fill a chunk
_SLAB_ROWS = 64
# of some rows: the output (n, block_q, D), and lse and tail share (n, block_q) or None
_Rows = tuple[Tensor, Tensor | None, Tensor | None]


@torch.autocast("cpu", enabled=False)
def block_sparse_cpu(call: BlockSparseCall, has_units: bool | None = None) -> Attended:
    """Computes a call that was checked.

    `has_units` says whether to leave bf16 to matrix units; None where the processor has some.

    Returns:
        The output (B, N, H, D), the lse and the tail share (B, N, H), which have size 0 unless
        they were asked for.
    """
    query, blocks = call.query, call.counts.shape[2]
    batch, queries, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype)
    lse = empty_per_query(query, call.return_lse)
    tail = empty_per_query(query, call.return_tail)
    is_fused = query.dtype == torch.bfloat16 and call.centroids is None and not call.return_lse
    is_fused = is_fused and (has_bf16_units() if has_units is None else has_units)
    wide = compute_dtype(query)
    scratch = Scratch.on(query.device, query.dtype if is_fused else wide, wide)
    slab_heads = max(1, _SLAB_ROWS // blocks)
    for sample in range(batch):
        for head in range(0, heads, slab_heads):
            some = slice(head, head + slab_heads)
            slab = build_slab(call, sample, some, is_fused)
            part, *numbers = _attend(slab, scratch, call)
            if call.row_scale is not None:
                part.mul_(call.row_scale[sample, some].reshape(-1, 1, 1))
            if call.row_bias is not None:
                part.add_(call.row_bias[sample, some].flatten(0, 1).unsqueeze(1))
            part = part.view(-1, part.shape[1] * blocks, part.shape[2])
            output[sample, :, some] = part[:, :queries].transpose(0, 1)
            for whole, number in zip((lse, tail), numbers, strict=True):
                if number is not None:
                    number = number.view(part.shape[:2])
                    whole[sample, :, some] = number[:, :queries].transpose(0, 1)
    return output, lse, tail


@functools.cache
def has_bf16_units() -> bool:
    """Whether the processor multiplies bf16 matrices in units of its own."""
    return torch.cpu._is_amx_tile_supported()


def _attend(slab: Slab, scratch: Scratch, call: BlockSparseCall) -> _Rows:
    """Computes every row of a slab in fp32 at least; lse and tail where the call asks for them."""
    shape = slab.query.shape
    output = scratch.result.resize_(shape).zero_()
    lse = output.new_full(shape[:2], -torch.inf) if call.return_lse else None
    tail = output.new_zeros(shape[:2]) if call.return_tail else None
    for rows in _chunks(slab):
        part: _Rows
        if slab.query.dtype == torch.bfloat16:
            part = _attend_fused(slab, scratch, rows), None, None
        else:
            part = _attend_chunk(slab, scratch, rows, call)
        index = torch.tensor(rows)
        for whole, some in zip((output, lse, tail), part, strict=True):
            if whole is not None and some is not None:
                whole.index_copy_(0, index, some)
    return output, lse, tail


def _chunks(slab: Slab) -> list[list[int]]:
    """Lists rows to compute together, longest first; rows without any key are left out."""
    block_q, dim = slab.query.shape[1:]
    column_bytes = 4 * (block_q + 2 * dim)
    chunk_bytes = _CHUNK_BYTES_PER_THREAD * torch.get_num_threads()
    chunks: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(slab.widths)), key=slab.widths.__getitem__, reverse=True):
        width = slab.widths[row] + slab.front_width
        if not width:
            break  # and so are all that follow
        is_full = chunks and (len(chunks[-1]) + 1) * longest * column_bytes > chunk_bytes
        if not chunks or is_full or width < _MIN_FILL * longest:
            chunks.append([])
            longest = width
        chunks[-1].append(row)
    return chunks


def _attend_chunk(slab: Slab, scratch: Scratch, rows: list[int], call: BlockSparseCall) -> _Rows:
    """Computes some rows padded to the longest, which comes first."""
    number, (_, block_k, dim), extra = len(rows), slab.key.shape, slab.extra_width
    block_q, width, front = slab.query.shape[1], slab.widths[rows[0]], slab.front_width
    blocks = slab.table[rows, : -(-width // block_k)]
    query = slab.query[rows]

    scores = scratch.scores.resize_(number, block_q, front + width)
    extra_key, extra_value, moments, centroid_value = slab.per_row(
        rows, slab.extra_key, slab.extra_value, slab.moments, slab.centroid_value
    )
    if extra_key is not None:
        torch.bmm(query, extra_key.transpose(1, 2), out=scores[..., :extra])
    if moments is not None and slab.centroid_bias is not None:
        has_variance = moments.shape[2] > dim
        powers = torch.cat([query, query.square().mul_(0.5)], 2) if has_variance else query
        torch.baddbmm(
            slab.centroid_bias[rows].unsqueeze(1),
            powers,
            moments.transpose(1, 2),
            out=scores[..., extra:front],
        )
    if width:
        key = _gather(scratch.key, slab.key, blocks)[:, :width]
        torch.bmm(query, key.transpose(1, 2), out=scores[..., front:])
    is_dead = _hide(slab, scores, rows, blocks)
    peak = scores.amax(dim=-1) if call.return_lse else None
    torch.softmax(scores, dim=-1, out=scores)

    output = scratch.output.resize_(number, block_q, dim)
    if width:
        value = _gather(scratch.value, slab.value, blocks)[:, :width]
        torch.bmm(scores[..., front:], value, out=output)
    else:
        output.zero_()
    if extra_value is not None:
        output.baddbmm_(scores[..., :extra], extra_value)
    if centroid_value is not None:
        output.baddbmm_(scores[..., extra:front], centroid_value)
    if is_dead is not None:
        output[is_dead] = 0.0
    lse = tail = None
    if peak is not None:  # the largest weight of a row is 1 / sum(exp(score - peak))
        lse = peak - scores.amax(dim=-1).log_()
    if call.return_tail:  # a sum of weights, which rounding may lift above 1
        tail = scores[..., extra:front].sum(dim=-1).clamp_(max=1.0)
    if is_dead is not None and lse is not None:
        lse[is_dead] = -torch.inf
    if is_dead is not None and tail is not None:
        tail[is_dead] = 0.0
    return output, lse, tail


def _attend_fused(slab: Slab, scratch: Scratch, rows: list[int]) -> Tensor:
    """Computes some rows with SDPA in bf16, without centroids or lse: (n, block_q, D) fp32."""
    width = slab.widths[rows[0]]
    blocks = slab.table[rows, : -(-width // slab.key.shape[1])]
    key = _gather(scratch.key, slab.key, blocks)[:, :width]
    value = _gather(scratch.value, slab.value, blocks)[:, :width]
    extra_key, extra_value = slab.per_row(rows, slab.extra_key, slab.extra_value)
    if extra_key is not None and extra_value is not None:
        key, value = torch.cat([extra_key, key], 1), torch.cat([extra_value, value], 1)
    bias = torch.zeros(len(rows), 1, key.shape[1], dtype=torch.float32)
    is_dead = _hide(slab, bias, rows, blocks)
    output = torch.nn.functional.scaled_dot_product_attention(
        slab.query[rows].unsqueeze(1),
        key.unsqueeze(1),
        value.unsqueeze(1),
        attn_mask=bias.bfloat16().unsqueeze(1) if bias.any() else None,
        scale=slab.scale,
    ).squeeze(1)
    if is_dead is not None:
        output[is_dead] = 0.0
    return output.float()


def _gather(buffer: Tensor, pool: Tensor, blocks: Tensor) -> Tensor:
    """Copies the blocks (n, count) of a pool together, to (n, count * block_k, D)."""
    gathered = buffer.resize_(blocks.numel(), *pool.shape[1:])
    torch.index_select(pool, 0, blocks.flatten(), out=gathered)
    return gathered.view(len(blocks), -1, pool.shape[2])


def _hide(slab: Slab, scores: Tensor, rows: list[int], blocks: Tensor) -> Tensor | None:
    """Sets scores (n, block_q, columns) of padding to -inf; returns which rows (n,) lost all."""
    extra, front, columns = slab.extra_width, slab.front_width, scores.shape[2]
    for i, row in enumerate(rows):
        if front + slab.widths[row] < columns:
            scores[i, :, front + slab.widths[row] :] = -torch.inf
    if slab.mask is None and slab.extra_mask is None and slab.centroid_bias is None:
        return None
    is_kept = torch.ones(len(rows), columns, dtype=torch.bool)
    if slab.extra_mask is not None:
        is_kept[:, :extra] = slab.extra_mask
    if slab.centroid_bias is not None:
        is_kept[:, extra:front] = slab.centroid_bias[rows] != -torch.inf
    if slab.mask is not None:
        is_kept[:, front:] = slab.mask[blocks % len(slab.mask)].flatten(1)[:, : columns - front]
    if slab.mask is not None or slab.extra_mask is not None:
        scores.masked_fill_(~is_kept.unsqueeze(1), -torch.inf)
    for i, row in enumerate(rows):
        is_kept[i, front + slab.widths[row] :] = False
    return ~is_kept.any(dim=1)
