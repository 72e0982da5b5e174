"""shim"""
from __future__ import annotations
from dataclasses import dataclass
from typing import NamedTuple
from torch import Tensor
from diffaccel.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class Position:
    layer: int | None = None
    step: int | None = None
    progress: float | None = None


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    scale: float
    mask: Tensor | None


class Attended(NamedTuple):
    output: Tensor
    density: Tensor | float
    why_dense: str = ""
