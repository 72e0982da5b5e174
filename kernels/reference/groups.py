"""Dense fp64 oracles of attention through tokens that stand for groups of others.

They go through the tokens one by one and build whole (B, H, N, M) maps: use them to check, at
small sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cell_numbers(grid: tuple[int, int, int], size: tuple[int, int, int]) -> list[int]:
    """Numbers the cells of a token grid in raster order and says in which each token lies."""
    across = [-(-side // step) for side, step in zip(grid, size, strict=True)]
    numbers = []
    for frame in range(grid[0]):
        for row in range(grid[1]):
            for column in range(grid[2]):
                cell = frame // size[0], row // size[1], column // size[2]
                numbers.append((cell[0] * across[1] + cell[1]) * across[2] + cell[2])
    return numbers


def group_means(
    tokens: Tensor, group: Tensor, number: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Averages the real tokens of each group.

    Args:
        tokens: (B, N, H, D), any float dtype.
        group: (B, N), 0 to `number` - 1.
        number: Groups n.
        valid: (B, N) bool, True for real tokens; None for all.

    Returns:
        The means (B, n, H, D), 0 for an empty group, and the counts (B, n), both fp64.
    """
    batch, length, heads, channels = tokens.shape
    means = torch.zeros(batch, number, heads, channels, dtype=torch.float64)
    counts = torch.zeros(batch, number, dtype=torch.float64)
    for sample in range(batch):
        for token in range(length):
            if valid is None or valid[sample, token]:
                means[sample, group[sample, token]] += tokens[sample, token].double()
                counts[sample, group[sample, token]] += 1
    return means / counts.clamp(min=1)[..., None, None], counts


def agent_attention(
    tokens: tuple[Tensor, Tensor, Tensor],
    agents: Tensor,
    *,
    scales: tuple[float, float],
    shortcut: float = 0.0,
    counts: Tensor | None = None,
    text: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Computes agent attention as one map, the product of two softmax maps.

    Args:
        tokens: Query, key and value of the visual tokens, each (B, N, H, D).
        agents: (B, n, H, D).
        scales: Of agents and keys and of queries and text; of queries and agents.
        shortcut: Share of the own value in addition.
        counts: (B, n), how many tokens each agent stands for: the weight of its exponential, 0
            leaves it out. None for 1.
        text: Key and value (B, T, H, D) that queries read beside the agents, in the same
            softmax, or None.
        valid: (B, N) bool, True where a visual key may be attended.

    Returns:
        (B, N, H, D), fp64.
    """
    query, key, value, agents = (x.double() for x in (*tokens, agents))
    scale, agent_scale = scales
    gather = _scores(agents, key, scale)
    if valid is not None:
        gather = gather.masked_fill(~valid[:, None, None], -torch.inf)
        value = value.masked_fill(~valid[..., None, None], 0.0)
    weights = torch.exp(_scores(query, agents, agent_scale))
    if counts is not None:
        weights = weights * counts.double()[:, None, None]
    one_map = torch.einsum("bhna,bham->bhnm", weights, gather.softmax(-1))
    output = torch.einsum("bhnm,bmhd->bhnd", one_map, value)
    total = weights.sum(-1)
    if text is not None:
        text_key, text_value = (x.double() for x in text)
        text_weights = torch.exp(_scores(query, text_key, scale))
        total = total + text_weights.sum(-1)
        output = output + torch.einsum("bhnt,bthd->bhnd", text_weights, text_value)
    return (output / total[..., None]).transpose(1, 2) + shortcut * value


def merged_attention(
    tokens: tuple[Tensor, Tensor, Tensor],
    group: Tensor,
    number: int,
    *,
    scale: float,
    text: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Computes attention among group means; a key weighs as often as its group has tokens.

    Args:
        tokens: Query, key and value of the visual tokens, each (B, N, H, D).
        group: (B, N), 0 to `number` - 1.
        number: Groups.
        scale: Factor on the scores.
        text: Key and value (B, T, H, D) that stand for themselves, or None.
        valid: (B, N) bool, True for real tokens.

    Returns:
        (B, N, H, D), fp64; all tokens of a group get the same.
    """
    (query, counts), (key, _), (value, _) = (group_means(x, group, number, valid) for x in tokens)
    weights = torch.exp(_scores(query, key, scale)) * counts[:, None, None]
    if text is not None:
        text_key, text_value = (x.double() for x in text)
        weights = torch.cat([weights, torch.exp(_scores(query, text_key, scale))], -1)
        value = torch.cat([value, text_value], 1)
    weights = weights / weights.sum(-1, keepdim=True)
    output = torch.einsum("bhnm,bmhd->bnhd", weights, value)
    return torch.stack([row[at] for row, at in zip(output, group, strict=True)])


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bnhd,bmhd->bhnm", query, key)
