"""Dense attention as a method: the baseline, and a way to switch a layer back."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method
from diffaccel.methods.visual import COMPUTED_DENSELY


@dataclass(frozen=True, slots=True, repr=False)
class FullAttn(Method):
    """Every query attends to every key, exactly, through PyTorch's SDPA."""

    def expected_density(self, layout: TokenLayout) -> float:
        return 1.0

    def shape_reason(self, layout: TokenLayout) -> str:
        return COMPUTED_DENSELY
