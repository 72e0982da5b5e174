"""Where the windows of neighborhood attention lie: pure arithmetic on one axis, then on grids.

The rule is that of NATTEN ("Generalized Neighborhood Attention", Hassani et al., 2025,
https://arxiv.org/abs/2504.16922): dilation splits an axis into interleaved groups; inside a
group, queries share a window in runs of `stride`, and windows near the border move inward, so
that every query has `kernel_size` keys. Causal windows end at the query and are cut off at the
start of the axis. Beyond that rule, runs may be shifted by a phase, and windows may be cut off at
both ends of the axis, as in Swin and in ordinary sliding windows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

# Copying one key costs about as much as this many products of it with a query.
_PAIRS_PER_KEY = 40
_MOST_QUERIES = 512  # of a tile


@dataclass(frozen=True, slots=True)
class Axis:
    """The window along one axis.

    Args:
        length: Tokens X.
        kernel: Keys per query K, at most X / dilation.
        stride: Queries that share a window S, 1 to K.
        dilation: Distance between the keys of a window d.
        is_causal: Whether queries see no later key.
        phase: Queries by which the first run is shorter, 0 to S - 1.
        is_truncated: Whether windows are cut off at the ends of the axis, not moved inward. K may
            then exceed X.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    phase: int = 0
    is_truncated: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.kernel == self.length and not self.is_causal and not self.is_truncated

    def group_length(self, group: int) -> int:
        """Tokens of one dilation group, 0 to dilation - 1."""
        return ceil((self.length - group) / self.dilation)


@dataclass(frozen=True, slots=True)
class AxisTiles:
    """Runs of queries whose windows look alike, seen from their union.

    Args:
        starts: First query of each run, inside the dilation group.
        box_starts: First key of the union of each run's windows.
        windows: Per query of a run, its first and one past its last key, from the box start.
        box: Keys in the union.
    """

    starts: tuple[int, ...]
    box_starts: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    box: int

    @property
    def is_full(self) -> bool:
        """Whether every query of a run sees the whole box."""
        return all(window == (0, self.box) for window in self.windows)


def window(position: int, length: int, axis: Axis) -> tuple[int, int]:
    """Returns the first and one past the last key of a query in a group of `length` tokens."""
    run = position - (position + axis.phase) % axis.stride
    if axis.is_causal:
        leader = min(run + axis.stride - 1, length - 1)
        return max(leader - axis.kernel + 1, 0), position + 1
    if axis.is_truncated:
        start = run + axis.stride // 2 - axis.kernel // 2
        return max(start, 0), min(start + axis.kernel, length)
    leader = min(run + axis.stride // 2, length - 1)
    start = min(max(leader - axis.kernel // 2, 0), length - axis.kernel)
    return start, start + axis.kernel


@lru_cache(maxsize=256)
def axis_tiles(axis: Axis, group: int, size: int) -> tuple[AxisTiles, ...]:
    """Cuts a dilation group into runs of `size` queries and collects those that look alike."""
    length = axis.group_length(group)
    alike: dict[tuple, list[tuple[int, int]]] = {}
    for start in range(0, length, size):
        seen = [window(p, length, axis) for p in range(start, min(start + size, length))]
        low, high = min(w[0] for w in seen), max(w[1] for w in seen)
        windows = tuple((first - low, last - low) for first, last in seen)
        alike.setdefault((windows, high - low), []).append((start, low))
    return tuple(
        AxisTiles(tuple(p[0] for p in places), tuple(p[1] for p in places), windows, box)
        for (windows, box), places in alike.items()
    )


def seen_share(axis: Axis) -> float:
    """Share of the query-key pairs along an axis that windows let through."""
    return visited_along(axis, 1, 1)


@lru_cache(maxsize=256)
def visited_along(axis: Axis, queries: int, keys: int) -> float:
    """Share of the pairs along an axis in the unions of the windows of runs of queries.

    Args:
        axis: The window.
        queries: Queries per run.
        keys: Keys that are visited together, counted from the start of a union.
    """
    pairs = sum(
        len(tiles.windows) * ceil(tiles.box / keys) * keys * len(tiles.starts)
        for group in range(axis.dilation)
        for tiles in axis_tiles(axis, group, queries)
    )
    return pairs / axis.length**2


@lru_cache(maxsize=256)
def tile_sizes(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Chooses the queries per tile and axis: few keys to copy, few pairs that are masked."""
    choices = [_sizes(axis) for axis in axes]
    fitting = [s for s in itertools.product(*choices) if prod(s) <= _MOST_QUERIES]
    smallest = tuple(sizes[0] for sizes in choices)
    return min(fitting or [smallest], key=lambda sizes: _gathering_work(axes, sizes))


def gathered_share(axes: tuple[Axis, ...]) -> float:
    """What gathering computes, masked pairs and copies of keys included, as a share of all pairs.

    A copy counts as the pairs that take as long.
    """
    residues = prod(axis.dilation for axis in axes)
    pairs = prod(axis.length for axis in axes) ** 2
    return residues * _gathering_work(axes, tile_sizes(axes)) / pairs


def _gathering_work(axes: tuple[Axis, ...], sizes: tuple[int, ...]) -> int:
    """Pairs of the tiles of one residue, and what copying their keys costs, as pairs."""
    queries, keys, tiles = prod(sizes), 1, 1
    for axis, size in zip(axes, sizes, strict=True):
        length = axis.group_length(0)
        keys *= min(length, axis.kernel + size - min(axis.stride, size))
        tiles *= ceil(length / size)
    return tiles * keys * (queries + _PAIRS_PER_KEY)


def _sizes(axis: Axis) -> list[int]:
    """Candidate run lengths: whole stride groups, doubling up to the axis."""
    length, sizes = axis.group_length(0), []
    size = axis.stride
    while size < length:
        sizes.append(size)
        size *= 2
    return [*sizes, length]
