"""What methods that let one token stand for many share: when they pay, and how text joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.inputs import AttentionInputs, ExactTokens, Position, VisualTokens
from diffaccel.methods.visual import VisualMethod, total_density


@dataclass(frozen=True, slots=True, repr=False)
class GroupedMethod(VisualMethod):
    """Visual queries meet tokens that stand for groups of visual tokens, and all others exactly.

    Text and condition queries run dense over everything. Where grouping saves no work, all runs
    dense. A subclass says why it would not (`shape_reason`), which share of the visual pairs its
    work amounts to, and what the visual queries get.
    """

    rates: ClassVar[dict[str, float]] = {"cpu": 0.85, "cuda": 0.7}
    """FLOP rate in terms of dense attention, by device. The CPU's is measured at 4k to 64k tokens
    (2 AVX2 cores, fp32); the GPU's is an assumption, not measured."""

    def visual_share(self, layout: TokenLayout) -> float:
        """Work on visual queries and keys as a share of dense attention."""
        raise NotImplementedError(f"{type(self).__name__} does not implement visual_share")

    def grouped_attention(self, visual: VisualTokens, exact: ExactTokens) -> Tensor:
        """Computes what the visual queries get, (B, N, H, D)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement grouped_attention")

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Multiplications over the rate on them."""
        if self.shape_reason(layout):
            return None
        return self.expected_density(layout) / self.rates.get(device, self.rates["cpu"])

    def expected_density(self, layout: TokenLayout) -> float:
        """Work as a share of dense attention: no pair of visual tokens is computed as such."""
        if self.shape_reason(layout):
            return 1.0
        return total_density(self.visual_share(layout), layout)

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> float:
        out.copy_(self.grouped_attention(inputs.visual(), inputs.exact()))
        return self.visual_share(inputs.layout)


def counted_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, exact: ExactTokens, scale: float
) -> Tensor:
    """Attends keys that stand for several each, beside others that stand for themselves.

    The logarithm of the count is added to the scores: exact where the keys of a group are equal.

    Args:
        query: (B, N, H, D).
        key: (B, n, H, D).
        value: (B, n, H, D).
        counts: (B or 1, n), how many keys each stands for; 0 leaves it out.
        exact: Tokens that stand for themselves, T of them, T may be 0.
        scale: Factor on the scores.
    """
    bias, valid = counts.to(torch.promote_types(query.dtype, torch.float32)).log(), None
    if exact.key.shape[1]:
        bias = bias.expand(len(query), -1)
        own = bias.new_zeros(exact.key.shape[:2])
        if exact.valid is not None:
            valid = torch.cat([bias > -torch.inf, exact.valid], 1)
        bias = torch.cat([bias, own], 1)
        key, value = torch.cat([key, exact.key], 1), torch.cat([value, exact.value], 1)
    return dense_attention(query, key, value, scale=scale, key_padding_mask=valid, key_bias=bias)


def check_least_tokens(least_tokens: int) -> None:
    """Raises ValueError unless the knob is a number of tokens."""
    if not isinstance(least_tokens, int) or isinstance(least_tokens, bool) or least_tokens < 0:
        raise ValueError(
            f"least_tokens must be an integer of at least 0, got {least_tokens=}; 0 never runs "
            "dense for being small"
        )
