"""Dense fp64 oracles of attention over blocks: statistics, selection, and what they lead to."""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from diffaccel.kernels.block_sparse.call import Attended, BlockSparseCall
from diffaccel.kernels.centroids import Centroids
from diffaccel.kernels.reference.attention import attention, merge_attention


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


def block_sparse_attention(call: BlockSparseCall) -> Attended:
    """Computes a call of `diffaccel.kernels.block_sparse_attention` with a dense mask, in fp64.

    Lists may be shared by samples and heads; which backend the call names does not matter.

    Returns:
        The output (B, N, H, D), and before `row_scale` and `row_bias` the lse and the share of
        the centroids in the softmax, both (B, N, H); all fp64, whatever the call asks for.
    """
    query, key, value = call.query, call.key, call.value
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    indices = call.indices.expand(batch, heads, -1, -1)
    counts = call.counts.expand(batch, heads, -1)
    expand = partial(block_mask, indices, counts, block_q=call.block_q, queries=queries)
    mask = expand(block_k=call.block_k, keys=keys)
    if call.key_padding_mask is not None:
        mask = mask & call.key_padding_mask[:, None, None, :]
    if call.extra_key is not None and call.extra_value is not None:
        extra_mask = mask.new_ones(batch, heads, queries, call.extra_key.shape[1])
        if call.extra_padding_mask is not None:
            extra_mask = extra_mask & call.extra_padding_mask[:, None, None, :]
        key = torch.cat([call.extra_key, key], dim=1)
        value = torch.cat([call.extra_value, value], dim=1)
        mask = torch.cat([extra_mask, mask], dim=3)
    output, lse = attention(query, key, value, mask, call.scale)
    tail = torch.zeros_like(lse)
    if call.centroids is not None:
        is_listed = expand(block_k=1, keys=call.centroids.key.shape[2])
        part = centroid_attention(query, ~is_listed, call.centroids, call.scale)
        output, lse = merge_attention([output, part[0]], [lse, part[1]])
        tail = torch.exp(part[1] - lse).masked_fill(lse == -torch.inf, 0.0)

    if call.row_scale is not None:
        per_query = call.row_scale.double().repeat_interleave(call.block_q, dim=2)[:, :, :queries]
        output = output * per_query.transpose(1, 2).unsqueeze(-1)
    if call.row_bias is not None:
        per_query = call.row_bias.double().repeat_interleave(call.block_q, dim=2)[:, :, :queries]
        output = output + per_query.transpose(1, 2)
    return output, lse, tail


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
    scores = scores + centroids.log_count.double().unsqueeze(2)
    if centroids.variance is not None:
        second = torch.einsum("bnhd,bhmd->bhnm", query.square(), centroids.variance.double())
        scores = scores + scale**2 / 2 * second
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(nan=0.0)
    return torch.einsum("bhnm,bhmd->bnhd", weights, centroids.value.double()), lse.transpose(1, 2)


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
