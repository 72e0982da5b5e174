"""Scratch memory that the chunks of one call share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """Buffers of one call: fresh pages for each chunk cost a CPU as much as its work.

    Empty at first. `resize_` brings a buffer to the shape that a chunk needs; it keeps the memory
    where that is large enough, and leaves the content undefined.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    output: Tensor
    result: Tensor

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> Scratch:
        """Returns empty buffers: tokens in `dtype`, all that is computed in fp32."""
        tokens = torch.empty(0, dtype=dtype, device=device)
        wide = torch.empty(0, dtype=torch.float32, device=device)
        key, value = torch.empty_like(tokens), torch.empty_like(tokens)
        output, result = torch.empty_like(wide), torch.empty_like(wide)
        return cls(tokens, key, value, wide, output, result)
