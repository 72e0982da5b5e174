"""Windows that narrow with the distance in time: Radial attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.selectors.pattern import Pattern, token_places

_SAMPLES = 8  # tokens of a block that are looked at
_STEP_ELEMENTS = 1 << 24  # pairs of tokens that are compared at a time


@dataclass(frozen=True, slots=True)
class RadialWindows(Pattern):
    """Keeps tokens within a window of positions that halves as the distance in frames doubles.

    With n tokens per frame, frames at a distance t see each other at positions of the frame that
    differ by less than

        width(t) = decay * 2**ceil(log2(n + 1)) / 2**bits(t)

    bits being the length of t in binary; frames at distance 0 and 1 see all of each other. Where
    the width falls below a block, a window of one block is kept at every (block / width)-th
    distance alone. Blocks are kept where the pattern has more than a fifth of their pairs (8 x 8
    tokens are looked at). "Radial Attention: O(n log n) Sparse Attention with Energy Decay for
    Long Video Generation" (Li et al., 2025, https://arxiv.org/abs/2506.19852), where blocks are
    kept by a similar rule of columns. All of an image is one frame, and so dense.

    Args:
        decay: Factor on the widths, above 0: 0.2 is published for Wan, 0.95 for HunyuanVideo.
        sink: Whether all see all of the first frame, as published for Wan.
    """

    decay: float = 0.2
    sink: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.decay > 0:
            raise ValueError(
                f"decay must be above 0, got decay={self.decay}; 0.2 suits Wan, 0.95 HunyuanVideo"
            )

    def pairs(self, order: TokenOrder) -> Tensor:
        frames, height, width = order.grid
        frame, row, column = token_places(order, _SAMPLES)
        place = row * width + column
        reach = self._reach(frames, height * width, order.block)
        blocks, samples = frame.shape
        kept = torch.empty(blocks, blocks, dtype=torch.bool)
        step = max(1, _STEP_ELEMENTS // (samples * samples * blocks))
        for start in range(0, blocks, step):
            some = slice(start, start + step)
            apart = (frame[some, :, None, None] - frame).abs()
            is_near = (place[some, :, None, None] - place).abs() < reach[apart]
            if self.sink:
                is_near |= frame == 0
            kept[some] = is_near.float().mean((1, 3)) > 0.2
        return kept | torch.eye(blocks, dtype=torch.bool)

    def _reach(self, frames: int, tokens: int, block: int) -> Tensor:
        """Width of the window at each distance in frames, 0 where nothing is seen: (frames,)."""
        reach = torch.full((frames,), float(tokens))
        for apart in range(2, frames):
            nominal = self.decay * 2 ** tokens.bit_length() / 2 ** apart.bit_length()
            every = 1 if nominal >= block else int(block / nominal)
            reach[apart] = 0.0 if apart % every else max(nominal, float(block))
        return reach
