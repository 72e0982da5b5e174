"""Dense fp64 oracles, written from the definition of each op.

They build the whole (B, H, N, M) score tensor and share no code with the fast paths: use them
to check, at small sizes.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from diffaccel.kernels.centroids import Centroids


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes softmax attention in fp64 from its definition.

    Args:
        query: (B, N, H, D), any float dtype.
        key: (B, M, H, D), any float dtype.
        value: (B, M, H, D), any float dtype. Keys that no query of a head attends may hold NaN.
        mask: Bool, broadcastable to (B, H, N, M), True where the key is attended.
        scale: Factor on the scores; None for D ** -0.5.

    Returns:
        The output (B, N, H, D) and the natural-log lse (B, N, H), both fp64. A row that attends
        nothing is 0 with lse -inf.
    """
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    if mask is not None:
        mask = mask.expand(scores.shape)
        scores = scores.masked_fill(~mask, -torch.inf)
        is_attended = mask.any(dim=2).transpose(1, 2).unsqueeze(-1)
        value = value.masked_fill(~is_attended, 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    is_empty = (lse == -torch.inf).unsqueeze(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(is_empty, 0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value), lse.transpose(1, 2)


def block_mask(
    indices: Tensor, counts: Tensor, *, block_q: int, block_k: int, queries: int, keys: int
) -> Tensor:
    """Expands block lists to the token mask that they stand for.

    Args:
        indices: (B, H, NQ, max_count) int32; entries beyond `counts` are ignored.
        counts: (B, H, NQ) int32.
        block_q: Queries per block.
        block_k: Keys per block.
        queries: Number of queries N.
        keys: Number of keys M.

    Returns:
        (B, H, N, M) bool, True where the key is attended.
    """
    key_blocks = -(-keys // block_k)
    blocks = torch.zeros(*counts.shape, key_blocks, dtype=torch.bool, device=indices.device)
    for row in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).tolist():
        kept = indices[tuple(row)][: int(counts[tuple(row)])]
        blocks[tuple(row)][kept.long()] = True
    by_query = blocks.repeat_interleave(block_q, dim=2)[:, :, :queries]
    return by_query.repeat_interleave(block_k, dim=3)[:, :, :, :keys]


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
) -> tuple[Tensor, Tensor]:
    """Computes `diffaccel.kernels.block_sparse_attention` in fp64 with a dense mask.

    Args and meaning are those of the op.

    Returns:
        The output (B, N, H, D) and the lse (B, N, H) before `row_scale` and `row_bias`, both
        fp64.
    """
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    mask = block_mask(
        indices.expand(batch, heads, -1, -1),
        counts.expand(batch, heads, -1),
        block_q=block_q,
        block_k=block_k,
        queries=queries,
        keys=keys,
    )
    if key_padding_mask is not None:
        mask = mask & key_padding_mask[:, None, None, :]
    if extra_key is not None:
        key, value = torch.cat([extra_key, key], dim=1), torch.cat([extra_value, value], dim=1)
        extra_mask = mask.new_ones(batch, heads, queries, extra_key.shape[1])
        if extra_padding_mask is not None:
            extra_mask = extra_mask & extra_padding_mask[:, None, None, :]
        mask = torch.cat([extra_mask, mask], dim=3)
    output, lse = attention(query, key, value, mask, scale)
    if centroids is not None:
        counts = counts.expand(batch, heads, -1)
        every_block = block_mask(
            indices.expand(batch, heads, -1, -1), counts,
            block_q=block_q, block_k=1, queries=queries, keys=centroids.key.shape[2],
        )  # fmt: skip
        part = centroid_attention(query, ~every_block, centroids, scale)
        output, lse = merge_attention([output, part[0]], [lse, part[1]])

    if row_scale is not None:
        per_query = row_scale.double().repeat_interleave(block_q, dim=2)[:, :, :queries]
        output = output * per_query.transpose(1, 2).unsqueeze(-1)
    if row_bias is not None:
        per_query = row_bias.double().repeat_interleave(block_q, dim=2)[:, :, :queries]
        output = output + per_query.transpose(1, 2)
    return output, lse


def centroid_attention(
    query: Tensor, mask: Tensor, centroids: Centroids, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attends block summaries alone, in fp64.

    Args:
        query: (B, N, H, D), any float dtype.
        mask: (B, H, N, NK) bool, True where the summary is attended.
        centroids: The NK summaries.
        scale: Factor on the scores; None for D ** -0.5.

    Returns:
        The output (B, N, H, D) and the natural-log lse (B, N, H), both fp64.
    """
    query = query.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bnhd,bhmd->bhnm", query, centroids.key.double())
    scores = scores + centroids.log_count.double()[:, None, None]
    if centroids.variance is not None:
        second = torch.einsum("bnhd,bhmd->bhnm", query.square(), centroids.variance.double())
        scores = scores + scale**2 / 2 * second
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(nan=0.0)
    return torch.einsum("bhnm,bhmd->bnhd", weights, centroids.value.double()), lse.transpose(1, 2)


def neighborhood_mask(
    length: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    phase: int = 0,
    is_truncated: bool = False,
) -> Tensor:
    """Builds the mask of neighborhood attention along one axis, pair by pair.

    Returns:
        (length, length) bool, True where the query (row) attends the key (column).
    """
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        group, place = query % dilation, query // dilation
        size = len(range(group, length, dilation))
        shared = (place + phase) // stride * stride - phase
        if is_causal:
            leader = min(shared + stride - 1, size - 1)
            start, end = max(leader - kernel_size + 1, 0), min(place + 1, size)
        elif is_truncated:
            start = shared + stride // 2 - kernel_size // 2
            end = start + kernel_size
        else:
            leader = min(shared + stride // 2, size - 1)
            start = min(max(leader - kernel_size // 2, 0), size - kernel_size)
            end = start + kernel_size
        for key in range(length):
            mask[query, key] = key % dilation == group and start <= key // dilation < end
    return mask


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[tuple[int, int, int, bool, int, bool]],
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `diffaccel.kernels.neighborhood_attention` in fp64 with a dense mask.

    Args:
        query: (B, X1..Xn, H, D).
        key: (B, X1..Xn, H, D).
        value: (B, X1..Xn, H, E).
        axes: Kernel size, stride, dilation, causality, phase and truncation of each axis; the
            last ones may be left out.
        scale: Factor on the scores; None for D ** -0.5.
        extra_key: (B, T, H, D) or None.
        extra_value: (B, T, H, E) or None.

    Returns:
        The output (B, X1..Xn, H, E) and the lse (B, X1..Xn, H), both fp64.
    """
    grid = query.shape[1:-2]
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, axis in zip(grid, axes, strict=True):
        mask = torch.kron(mask.int(), neighborhood_mask(length, *axis).int()).bool()
    query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    if extra_key is not None:
        key, value = torch.cat([extra_key, key], dim=1), torch.cat([extra_value, value], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), extra_key.shape[1]), mask], dim=1)
    output, lse = attention(query, key, value, mask[None, None], scale)
    return output.unflatten(1, grid), lse.unflatten(1, grid)


def block_statistics(
    tokens: Tensor, block: int, valid: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summarises the blocks of one tensor in fp64, from lists of their real tokens.

    Args:
        tokens: (B, N, H, D), any float dtype.
        block: Tokens per block.
        valid: (B, N) bool, True for real tokens, in the order of `tokens`; None for all.
        order: (N,) permutation; position i holds token `order[i]`. None for the given order.

    Returns:
        Mean, mean absolute deviation and variance, each (B, H, NB, D), 0 for a block without
        tokens, and the counts (B, NB), all fp64.
    """
    batch, length, heads, channels = tokens.shape
    ids = list(range(length)) if order is None else order.tolist()
    runs = [ids[start : start + block] for start in range(0, length, block)]
    summary = torch.zeros(3, batch, heads, len(runs), channels, dtype=torch.float64)
    counts = torch.zeros(batch, len(runs), dtype=torch.float64)
    for sample in range(batch):
        for number, run in enumerate(runs):
            real = [token for token in run if valid is None or valid[sample, token]]
            counts[sample, number] = len(real)
            if real:
                members = torch.stack([tokens[sample, token].double().cpu() for token in real])
                deviation = members - members.mean(0)
                summary[0, sample, :, number] = members.mean(0)
                summary[1, sample, :, number] = deviation.abs().mean(0)
                summary[2, sample, :, number] = deviation.square().mean(0)
    return *summary, counts


def select_blocks(
    scores: Sequence[float],
    top_k: int,
    p_remain: float = 0.0,
    text: float = 0.0,
    forced: Sequence[bool] | None = None,
) -> list[int]:
    """Chooses the blocks of one row of `diffaccel.kernels.select_blocks`, in exact fractions.

    Args and meaning are those of the op for one row.

    Returns:
        The kept blocks, ascending.
    """
    ranked = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    mass, needed = Fraction(text), 0
    limit = Fraction(torch.tensor(p_remain, dtype=torch.float32).item())
    while p_remain > 0 and needed < len(ranked) and mass <= limit:
        mass += Fraction(scores[ranked[needed]])
        needed += 1
    kept = set(ranked[: max(needed, top_k)])
    if forced is not None:
        kept |= {block for block, is_forced in enumerate(forced) if is_forced}
    return sorted(block for block in kept if scores[block] > 0)


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint key sets in fp64.

    Args:
        outputs: Partial results, each (B, N, H, D).
        lses: Natural-log lse of each part, (B, N, H).

    Returns:
        The merged output (B, N, H, D) and lse (B, N, H), both fp64.
    """
    stacked = torch.stack([lse.double() for lse in lses])
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse).nan_to_num(nan=0.0)
    parts = torch.stack([output.double() for output in outputs])
    return (weights.unsqueeze(-1) * parts).sum(dim=0), lse
