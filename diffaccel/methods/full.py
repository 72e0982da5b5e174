"""Dense attention as a method: the baseline, and a way to switch a layer back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method


@dataclass(frozen=True, slots=True)
class FullAttn(Method):
    """Every query attends to every key, exactly, through PyTorch's SDPA."""

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Everything."""
        return 1.0

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
        output = dense_attention(query, key, value, scale=scale, key_padding_mask=key_padding_mask)
        return output, 1.0
