"""Cells of the token grid: their mean tokens, their middle tokens, and tokens matched to them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from diffaccel.layout import Grid

_MOST_SCORES = 1 << 24
"""Similarities that exist at a time, 64 MiB of fp32."""


class Groups(NamedTuple):
    """One token for each of n groups of tokens.

    Args:
        tokens: (B, n, H, D), 0 where a group has no real token.
        counts: Real tokens of each group, (B or 1, n).
    """

    tokens: Tensor
    counts: Tensor


class Matching(NamedTuple):
    """Which cell every token resembles most.

    Args:
        cell: (B, N) int64; the own cell for the middle tokens.
        similarity: (B, N) fp32 cosine with the middle token of that cell; inf for the middle
            tokens themselves, -inf for padding beside them.
    """

    cell: Tensor
    similarity: Tensor


@dataclass(frozen=True, slots=True)
class Cells:
    """A token grid cut into cells; the last ones of an axis may be smaller.

    Args:
        grid: (frames, height, width) in tokens.
        size: Tokens of a cell along the same axes.
    """

    grid: Grid
    size: Grid

    @property
    def shape(self) -> Grid:
        """Cells along each axis."""
        frames, height, width = (
            -(-n // size) for n, size in zip(self.grid, self.size, strict=True)
        )
        return frames, height, width

    @property
    def number(self) -> int:
        """Cells in all, n."""
        return prod(self.shape)

    def means(self, tokens: Tensor, valid: Tensor | None = None) -> Groups:
        """Averages the real tokens of each cell.

        Args:
            tokens: (B, N, H, D), the N tokens of the grid in raster order.
            valid: (B, N) bool, True for real tokens; None for all.

        Returns:
            The means, taken in fp32 at least and rounded to the dtype of `tokens`.
        """
        if valid is not None:
            tokens = tokens.masked_fill(~valid[..., None, None], 0.0)
        counts = self.counts(valid, tokens.device)
        totals = self._sums(tokens.flatten(2))
        means = totals / counts.clamp(min=1)[..., None].to(totals.dtype)
        return Groups(means.to(tokens.dtype).unflatten(2, tokens.shape[2:]), counts)

    def counts(self, valid: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Counts the real tokens of each cell: (B or 1, n) fp32."""
        if valid is None:
            valid = torch.ones(1, prod(self.grid), dtype=torch.bool, device=device)
        return self._sums(valid[..., None]).squeeze(-1)

    def middles(self, valid: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Finds the real token of each cell that is closest to its middle.

        Args:
            valid: (B, N) bool, True for real tokens; None for all.
            device: Where the result is wanted, if there is no `valid`.

        Returns:
            (B or 1, n) int64, places in the grid; any place in a cell without real tokens.
        """
        device = device if valid is None else valid.device
        places = torch.arange(prod(self.grid), device=device)
        places = self._by_cell(places[None] + 1) - 1  # -1 beyond the grid
        is_real = places >= 0 if valid is None else self._by_cell(valid)
        worst = prod(self.size)
        rank = self._ranks(device) + worst * (~is_real).int() + 2 * worst * (places < 0).int()
        places = places.expand(len(is_real), -1, -1)
        return places.gather(2, rank.argmin(2, keepdim=True)).squeeze(2)

    def matched(self, key: Tensor, valid: Tensor | None = None) -> Matching:
        """Finds for every token the cell whose middle token it resembles most.

        Bipartite matching between the middle tokens and all others ("Token Merging: Your ViT But
        Faster", Bolya et al., 2022, https://arxiv.org/abs/2210.09461), by the cosine of the keys'
        means over the heads, as there.

        Args:
            key: (B, N, H, D), the N tokens of the grid in raster order.
            valid: (B, N) bool, True for real tokens; None for all.
        """
        batch, length = key.shape[:2]
        if valid is not None:
            key = key.masked_fill(~valid[..., None, None], 0.0)
        features = normalize(key.float().mean(2), dim=-1)
        middles = self.middles(valid, key.device).expand(batch, -1)
        targets = taken(features, middles).transpose(1, 2)
        closed = None if valid is None else ~valid.gather(1, middles)[:, None]
        found = []
        for rows in features.split(max(1, _MOST_SCORES // (batch * self.number)), dim=1):
            scores = rows @ targets
            found.append((scores if closed is None else scores.masked_fill(closed, -2.0)).max(2))
        similarity, cell = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        numbers = torch.arange(self.number, device=key.device).expand(batch, -1)
        if valid is not None:
            similarity = similarity.masked_fill(~valid, -torch.inf)
        similarity = similarity.scatter(1, middles, torch.inf)
        return Matching(cell.scatter(1, middles, numbers), similarity)

    def _sums(self, tokens: Tensor) -> Tensor:
        """Sums (B, N, C) over each cell, in fp32 at least: (B, n, C)."""
        wide = _wide(tokens)
        tokens = tokens.unflatten(1, self.grid)
        for axis, (side, size) in enumerate(zip(self.grid, self.size, strict=True), start=1):
            if size == 1:
                continue
            if side % size:
                missing = (0, 0) * (4 - axis) + (0, -side % size)
                tokens = pad(tokens, missing)
            tokens = tokens.unflatten(axis, (-1, size)).sum(axis + 1, dtype=wide)
        return tokens.flatten(1, 3).to(wide)

    def _by_cell(self, tokens: Tensor) -> Tensor:
        """Sorts (B, N) into cells, with zeros beyond the grid: (B, n, tokens of a cell)."""
        shape, size = self.shape, self.size
        tokens = tokens.unflatten(1, self.grid)
        missing = [n * c - side for n, c, side in zip(shape, size, self.grid, strict=True)]
        tokens = pad(tokens, [x for count in reversed(missing) for x in (0, count)])
        tokens = tokens.reshape(-1, shape[0], size[0], shape[1], size[1], shape[2], size[2])
        return tokens.permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3).flatten(2)

    def _ranks(self, device: torch.device | None) -> Tensor:
        """Ranks the places in a cell by their distance from its middle; raster order in ties."""
        axes = [(2 * torch.arange(size) - size + 1).square() for size in self.size]
        distance = axes[0][:, None, None] + axes[1][:, None] + axes[2]
        return distance.flatten().argsort(stable=True).argsort().to(device)


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Takes tokens (B, N, ...) at places (B or 1, n): (B, n, ...)."""
    if len(places) == 1:
        return tokens.index_select(1, places[0])
    return torch.stack([row.index_select(0, at) for row, at in zip(tokens, places, strict=True)])


def group_means(tokens: Tensor, group: Tensor, number: int, valid: Tensor | None = None) -> Groups:
    """Averages the real tokens of each group, the same bits on every run.

    Args:
        tokens: (B, N, H, D).
        group: (B, N) int64, the group of each token, 0 to `number` - 1.
        number: Groups.
        valid: (B, N) bool, True for real tokens; None for all.

    Returns:
        The means, taken in fp32 at least and rounded to the dtype of `tokens`.
    """
    # Sorted sums have one order on a GPU too, where scattered ones have none.
    order = group.argsort(dim=1, stable=True)
    sizes = _counted(group, number)
    if valid is not None:
        tokens = tokens.masked_fill(~valid[..., None, None], 0.0)
    ordered = taken(tokens.flatten(2), order).to(_wide(tokens))
    totals = torch.segment_reduce(ordered, "sum", lengths=sizes, axis=1)
    counts = sizes if valid is None else _counted(group, number, valid)
    means = totals / counts.clamp(min=1)[..., None]
    return Groups(means.to(tokens.dtype).unflatten(2, tokens.shape[2:]), counts)


def _wide(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def _counted(group: Tensor, number: int, valid: Tensor | None = None) -> Tensor:
    ones = torch.ones_like(group) if valid is None else valid.long()
    return torch.zeros(len(group), number, dtype=torch.long, device=group.device).scatter_add_(
        1, group, ones
    )
