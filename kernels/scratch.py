"""Scratch memory that the chunks of one call share."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass(slots=True)
class Scratch:
    """Named buffers on one device: fresh pages for each chunk cost a CPU as much as its work."""

    device: torch.device | str = "cpu"
    flat: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns uninitialised memory, valid until the next take of this name."""
        size = prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.flat[name][:size].view(shape)
