"""Neighborhood attention by gathering: tiles of queries against the union of their windows.

Tiles whose windows look alike from their union (all those away from the borders do) are computed
in few batched matrix products under one small mask. Runs on any device in plain PyTorch; memory
stays proportional to one chunk of gathered windows. All arithmetic is fp32, fp64 for fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels.arguments import compute_dtype
from diffaccel.kernels.neighborhood.call import NeighborhoodCall
from diffaccel.kernels.neighborhood.windows import Axis, AxisTiles, axis_tiles, tile_sizes
from diffaccel.kernels.scratch import Scratch

# scores and gathered windows of one chunk: what fits a cache, or what fills a GPU
_CHUNK_BYTES_PER_THREAD = 8 << 20
_CHUNK_BYTES = 256 << 20


class Tiles(NamedTuple):
    """Tiles that look alike: token numbers of their queries (n, Q) and of their windows' union
    (n, K), and which query sees which key (Q, K), None for all."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sample, heads first, fp32 at least: scaled query (H, N, D), key and value (H, M, .).

    Keys that every query sees (`extras`) follow those of the grid; `valid` (N,) bool tells real
    keys of the grid from padding, None if all are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    extras: int
    valid: Tensor | None


def neighborhood_gather(call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Computes a call that was checked.

    Returns:
        The output in the shape of query, with the head dim of value, and the lse without the
        last dim, which has size 0 unless it was asked for.
    """
    query, grid, heads = call.query, call.query.shape[1:-2], call.query.shape[-2]
    output = query.new_empty(len(query), prod(grid), heads, call.value.shape[-1])
    lse_shape = output.shape[:-1] if call.return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=query.device)
    groups, wide = list(tile_groups(call.axes, query.device)), compute_dtype(query)
    scratch = Scratch.on(query.device, wide, wide)
    for number in range(len(query)):
        sample = _sample(call, number)
        for tiles in groups:
            for part in _chunks(tiles, sample):
                rows = part.queries.flatten()
                result, normaliser = _attend(sample, part, call.return_lse, scratch)
                output[number, rows] = result.transpose(0, 1).to(output.dtype)
                if normaliser is not None:
                    lse[number, rows] = normaliser.transpose(0, 1).float()
    return output.unflatten(1, grid), lse.unflatten(1, grid) if call.return_lse else lse


def _sample(call: NeighborhoodCall, number: int) -> Sample:
    heads, length = call.query.shape[-2], prod(call.query.shape[1:-2])
    one = slice(number, number + 1)
    query, key, value = (x[one].flatten(1, -3) for x in (call.query, call.key, call.value))
    more_keys, more_values = [], []
    if call.extra_key is not None and call.extra_value is not None:
        mask = call.extra_padding_mask
        real = slice(None) if mask is None else mask[number]
        more_keys, more_values = [call.extra_key[one, real]], [call.extra_value[one, real]]
    q = _heads_first(heads, query).mul_(call.factor)
    k = _heads_first(heads, key, *more_keys)
    v = _heads_first(heads, value, *more_values)
    valid = None if call.key_padding_mask is None else call.key_padding_mask[number].flatten()
    if valid is not None:  # padding may hold NaN, which a weight of 0 would not remove
        k[:, :length].masked_fill_(~valid[:, None], 0.0)
        v[:, :length].masked_fill_(~valid[:, None], 0.0)
    return Sample(q, k, v, k.shape[1] - length, valid)


def tile_groups(axes: tuple[Axis, ...], device: torch.device) -> Iterator[Tiles]:
    """Yields all tiles of a grid, those that look alike together."""
    sizes = tile_sizes(axes)
    for residues in itertools.product(*(range(axis.dilation) for axis in axes)):
        per_axis = [
            axis_tiles(axis, residue, size)
            for axis, residue, size in zip(axes, residues, sizes, strict=True)
        ]
        for alike in itertools.product(*per_axis):
            queries = _token_numbers(
                [(t.starts, len(t.windows)) for t in alike], axes, residues, device
            )
            keys = _token_numbers([(t.box_starts, t.box) for t in alike], axes, residues, device)
            yield Tiles(queries, keys, _mask(alike, device))


def _token_numbers(
    runs: list[tuple[tuple[int, ...], int]],
    axes: tuple[Axis, ...],
    residues: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Numbers the tokens of boxes, row-major: (boxes, tokens per box)."""
    number, rank = torch.zeros((), dtype=torch.long, device=device), len(axes)
    for place, (axis, residue, (starts, count)) in enumerate(
        zip(axes, residues, runs, strict=True)
    ):
        step = prod(other.length for other in axes[place + 1 :])
        first = torch.tensor(starts, device=device)[:, None]
        along = (first + torch.arange(count, device=device)) * axis.dilation + residue
        shape = [1] * (2 * rank)
        shape[place], shape[rank + place] = along.shape
        number = number + (along * step).view(shape)
    return number.flatten(0, rank - 1).flatten(1)


def _mask(alike: tuple[AxisTiles, ...], device: torch.device) -> Tensor | None:
    """Combines the axes: (Q, K) bool, None where all is seen."""
    if all(tiles.is_full for tiles in alike):
        return None
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for tiles in alike:
        first, last = torch.tensor(tiles.windows, device=device).unbind(1)
        along = torch.arange(tiles.box, device=device)
        seen = (along >= first[:, None]) & (along < last[:, None])
        mask = (mask[:, None, :, None] & seen[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask


def _chunks(tiles: Tiles, sample: Sample) -> Iterator[Tiles]:
    """Splits tiles into parts that a byte budget bounds."""
    budget = _CHUNK_BYTES
    if tiles.queries.device.type == "cpu":
        budget = _CHUNK_BYTES_PER_THREAD * torch.get_num_threads()
    count, most = tiles.queries.shape
    keys = tiles.keys.shape[1] + sample.extras
    dims = sample.query.shape[-1] + sample.value.shape[-1]
    step = max(1, budget // (4 * len(sample.query) * keys * (most + dims)))
    for start in range(0, count, step):
        part = slice(start, start + step)
        yield Tiles(tiles.queries[part], tiles.keys[part], tiles.mask)


def _attend(
    sample: Sample, tiles: Tiles, with_lse: bool, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """Computes n tiles, which all see the extra keys too.

    Returns:
        The output (H, n * Q, E), valid until the next call, and the lse (H, n * Q).
    """
    key, extras, valid = sample.key, sample.extras, sample.valid
    heads, (count, most) = len(key), tiles.queries.shape
    numbers = tiles.keys
    if extras:
        last = torch.arange(key.shape[1] - extras, key.shape[1], device=key.device)
        numbers = torch.cat([numbers, last.expand(count, -1)], 1)
    q = _gather(scratch.query, sample.query, tiles.queries)
    k = _gather(scratch.key, key, numbers)
    scores = scratch.scores.resize_(heads * count, most, k.shape[1])
    torch.bmm(q, k.mT, out=scores)
    inside = scores[..., : tiles.keys.shape[1]]
    if tiles.mask is not None:
        inside.masked_fill_(~tiles.mask, -torch.inf)
    is_empty = None
    if valid is not None:
        is_real = valid[tiles.keys][:, None]
        inside.masked_fill_(~is_real.repeat(heads, 1, 1), -torch.inf)
        if not extras:  # only padding can leave a row without any key
            seen = is_real if tiles.mask is None else is_real & tiles.mask
            is_empty = ~seen.any(-1, keepdim=True).expand(count, most, 1).repeat(heads, 1, 1)
    peak = scores.amax(-1) if with_lse else None
    torch.softmax(scores, -1, out=scores)
    if is_empty is not None:
        scores.masked_fill_(is_empty, 0.0)
    v = _gather(scratch.value, sample.value, numbers)
    output = scratch.output.resize_(heads * count, most, v.shape[2])
    torch.bmm(scores, v, out=output)
    output = output.view(heads, count * most, -1)
    if peak is None:
        return output, None
    # the largest weight of a row is 1 / sum(exp(score - peak))
    lse = peak - scores.amax(-1).log_()
    if is_empty is not None:
        lse.masked_fill_(is_empty.squeeze(-1), -torch.inf)
    return output, lse.view(heads, count * most)


def _gather(buffer: Tensor, tokens: Tensor, numbers: Tensor) -> Tensor:
    """Copies tokens (H, N, D) by number (n, K) to (H * n, K, D)."""
    heads, _, dim = tokens.shape
    picked = buffer.resize_(heads, numbers.numel(), dim)
    torch.index_select(tokens, 1, numbers.flatten(), out=picked)
    return picked.view(-1, numbers.shape[1], dim)


def _heads_first(heads: int, *parts: Tensor) -> Tensor:
    """Copies parts (1, n, G, D) one after another to (heads, N, D), in fp32 at least."""
    tokens = torch.cat([part[0].transpose(0, 1) for part in parts], 1).to(compute_dtype(parts[0]))
    groups = heads // tokens.shape[0]
    return tokens if groups == 1 else tokens.repeat_interleave(groups, 0)
