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
    def on(cls, device: torch.device, tokens: torch.dtype, wide: torch.dtype) -> Scratch:
        """Returns empty buffers in the dtype of tokens, and in the one that computes."""
        query, key, value = (torch.empty(0, dtype=tokens, device=device) for _ in range(3))
        scores, output, result = (torch.empty(0, dtype=wide, device=device) for _ in range(3))
        return cls(query, key, value, scores, output, result)
