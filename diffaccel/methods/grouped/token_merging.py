"""Token merging: tokens that resemble each other attend as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.grouped.base import GroupedMethod, check_least_tokens, counted_attention
from diffaccel.methods.grouped.cells import Cells, group_means, taken
from diffaccel.methods.inputs import ExactTokens, VisualTokens
from diffaccel.methods.windows.base import Extent, check_extent, spread


@dataclass(frozen=True, slots=True, repr=False)
class TokenMergingAttn(GroupedMethod):
    """Merges the visual tokens that resemble another one most, attends, and unmerges.

    The middle token of every cell of the grid is a target; each other token finds the target
    that it resembles most, and the `merge` most similar of them all join theirs. A merged token
    is the mean query, key and value of its members, and its key counts as often as it has
    members: exact where members are equal. All members get its output. Text and condition tokens
    are attended exactly by all, and their own queries run dense.

    After "Token Merging: Your ViT But Faster" (Bolya et al., 2022,
    https://arxiv.org/abs/2210.09461) and "Token Merging for Fast Stable Diffusion" (Bolya,
    Hoffman, 2023, https://arxiv.org/abs/2303.17604). The latter compares the inputs of a block,
    which a method does not see; here it is the mean key over the heads, as in the former. The
    targets are middle tokens instead of random ones, so that two runs agree, and merged keys are
    counted, which the latter leaves out. Meant for U-Nets: where queries and keys are rotated by
    position, means of distant tokens lose high frequencies.

    Args:
        merge: Share of the visual tokens that is merged into others, 0 (dense) to below 1; at
            most all tokens but one for each cell are.
        cell: Tokens of the grid for one target: one number for height and width, or (height,
            width), with each frame apart; or (frames, height, width).
        least_tokens: Visual tokens below which all runs dense.
        dense_steps, dense_layers: As of `ScheduledMethod`.

    Example:
        >>> pipe.set_attn_processor(TokenMergingAttn(merge=0.4))
    """

    rates: ClassVar[dict[str, float]] = {"cpu": 0.6, "cuda": 0.5}
    """As of `GroupedMethod`, matching included."""

    merge: float = 0.5
    cell: Extent = 2
    least_tokens: int = 1024

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 <= self.merge < 1.0:
            raise ValueError(
                f"merge must be at least 0 and below 1, got merge={self.merge}; 0.5 halves the "
                "tokens"
            )
        check_extent("cell", self.cell)
        check_least_tokens(self.least_tokens)
        ScheduledMethod.__post_init__(self)

    @property
    def compares_heads(self) -> bool:
        return True

    def cells(self, layout: TokenLayout) -> Cells:
        """The cells of the grid of a layout, one for each target."""
        size = map(min, spread(self.cell, (1, 1, 1)), layout.grid)
        return Cells(layout.grid, cast(Grid, tuple(size)))

    def merged(self, layout: TokenLayout) -> int:
        """How many visual tokens are merged into others."""
        tokens = layout.visual.length
        return min(int(self.merge * tokens), tokens - self.cells(layout).number)

    def shape_reason(self, layout: TokenLayout) -> str:
        if layout.visual is None:
            return "there are no visual tokens"
        tokens = layout.visual.length
        if tokens < self.least_tokens:
            return f"{tokens} visual tokens are below least_tokens={self.least_tokens}"
        if self.merged(layout) == 0:
            return f"merge={self.merge} with cell={self.cell} merges none of {tokens} tokens"
        return ""

    def visual_share(self, layout: TokenLayout) -> float:
        """The square of the share of tokens that remain."""
        tokens = layout.visual.length
        return ((tokens - self.merged(layout)) / tokens) ** 2

    def groups(self, key: Tensor, layout: TokenLayout, valid: Tensor | None = None) -> Tensor:
        """Says which tokens become one.

        Args:
            key: (B, N, H, D) of the visual tokens.
            layout: All tokens.
            valid: (B, N) bool, True for real tokens; None for all.

        Returns:
            (B, N) int64, the group of each token, 0 to N - merged - 1 in the order of the
            tokens that the others join.
        """
        cells = self.cells(layout)
        matching = cells.matched(key, valid)
        is_target = matching.similarity == torch.inf
        # Padding goes last but before the targets, which never leave their place.
        ranking = matching.similarity.clamp(min=-3.0).masked_fill(is_target, -4.0)
        order = ranking.argsort(dim=1, descending=True, stable=True)
        leaves = torch.zeros_like(is_target).scatter(1, order[:, : self.merged(layout)], True)
        place = (~leaves).cumsum(1) - 1
        targets = cells.middles(valid, key.device).expand(len(key), -1)
        joined = place.gather(1, targets.gather(1, matching.cell))
        return torch.where(leaves, joined, place)

    def grouped_attention(self, visual: VisualTokens, exact: ExactTokens) -> Tensor:
        layout = visual.layout
        group = self.groups(visual.key, layout, visual.valid)
        number = layout.visual.length - self.merged(layout)
        joined = torch.cat([visual.query, visual.key, visual.value], 2)
        tokens, counts = group_means(joined, group, number, visual.valid)
        query, key, value = tokens.chunk(3, dim=2)
        output = counted_attention(query, key, value, counts, exact, visual.scale)
        return taken(output, group)
