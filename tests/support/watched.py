"""A method that writes down what reaches it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import torch

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.inputs import Attended


@dataclass(frozen=True)
class Seen:
    """One call that reached a watching method."""

    layout: TokenLayout
    shape: tuple[int, ...]
    layer: int
    step: int
    key_padding_mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class WatchedAttn(ScheduledMethod):
    """Dense attention that writes down what it gets."""

    _: KW_ONLY
    dense_steps: int | None = 0
    dense_layers: tuple[int, ...] | int | None = 0
    calls: list[Seen] = field(default_factory=list, repr=False, compare=False)

    def compute(self, inputs, position):
        shape = tuple(inputs.query.shape)
        self.calls.append(Seen(inputs.layout, shape, position.layer, position.step, inputs.mask))
        return Attended(inputs.dense(), torch.ones(()))
