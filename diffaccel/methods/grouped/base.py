"""What methods that let one token stand for many share: when they pay, and how text joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method
from diffaccel.methods.exact_tokens import OtherKeys, other_keys, other_rows, total_density


@dataclass(frozen=True, slots=True)
class GroupedMethod(Method):
    """Visual queries meet tokens that stand for groups of visual tokens, and all others exactly.

    Text and condition queries run dense over everything. Where grouping saves no work, all runs
    dense. A subclass says why it would not, which share of the visual pairs its work amounts to,
    and what the visual queries get.
    """

    rates: ClassVar[dict[str, float]] = {"cpu": 0.85, "cuda": 0.7}
    """FLOP rate in terms of dense attention, by device. The CPU's is measured at 4k to 64k tokens
    (2 AVX2 cores, fp32); the GPU's is an assumption, not measured."""

    def idle_reason(self, layout: TokenLayout) -> str:
        """Why a layout runs dense, "" where it does not."""
        raise NotImplementedError(f"{type(self).__name__} does not implement idle_reason")

    def visual_share(self, layout: TokenLayout) -> float:
        """Work on visual queries and keys as a share of dense attention."""
        raise NotImplementedError(f"{type(self).__name__} does not implement visual_share")

    def dense_reason(self, layout: TokenLayout) -> str:
        """Why the method runs a layout dense."""
        return self.idle_reason(layout)

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Multiplications over the rate on them."""
        if self.idle_reason(layout):
            return None
        return self.expected_density(layout) / self.rates.get(device, self.rates["cpu"])

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Work as a share of dense attention: no pair of visual tokens is computed as such."""
        if self.idle_reason(layout):
            return 1.0
        return total_density(self.visual_share(layout), layout)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        layer: int | None,
    ) -> tuple[Tensor, Tensor | float]:
        if self.idle_reason(layout):
            dense = dense_attention(
                query, key, value, scale=scale, key_padding_mask=key_padding_mask
            )
            return dense, 1.0
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output = other_rows(query, key, value, layout, scale, key_padding_mask)
        visual = layout.visual_slice
        output[:, visual] = self._attend_visual(
            *(tokens[:, visual] for tokens in (query, key, value)),
            layout,
            scale,
            None if key_padding_mask is None else key_padding_mask[:, visual],
            other_keys(key, value, key_padding_mask, layout),
        )
        return output, self.expected_density(layout)

    def _attend_visual(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float,
        valid: Tensor | None,
        others: OtherKeys,
    ) -> Tensor:
        """What the visual queries get, from the visual tokens (B, N, H, D) and the others."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _attend_visual")


def counted_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, others: OtherKeys, scale: float
) -> Tensor:
    """Attends keys that stand for several each, beside others that stand for themselves.

    The logarithm of the count is added to the scores: exact where the keys of a group are equal.

    Args:
        query: (B, N, H, D).
        key: (B, n, H, D).
        value: (B, n, H, D).
        counts: (B or 1, n), how many keys each stands for; 0 leaves it out.
        others: Tokens that stand for themselves, T of them, T may be 0.
        scale: Factor on the scores.
    """
    bias, valid = counts.to(torch.promote_types(query.dtype, torch.float32)).log(), None
    if others.key.shape[1]:
        bias = bias.expand(len(query), -1)
        own = bias.new_zeros(others.key.shape[:2])
        if others.valid is not None:
            valid = torch.cat([bias > -torch.inf, others.valid], 1)
        bias = torch.cat([bias, own], 1)
        key, value = torch.cat([key, others.key], 1), torch.cat([value, others.value], 1)
    return dense_attention(query, key, value, scale=scale, key_padding_mask=valid, key_bias=bias)


def check_least_tokens(least_tokens: int) -> None:
    """Raises ValueError unless the knob is a number of tokens."""
    if not isinstance(least_tokens, int) or isinstance(least_tokens, bool) or least_tokens < 0:
        raise ValueError(
            f"least_tokens must be an integer of at least 0, got {least_tokens=}; 0 never runs "
            "dense for being small"
        )
