"""One token that stands for a run of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import BlockCall


def representatives(call: BlockCall, size: int, place: Tensor | float = 0.5) -> Tensor:
    """Picks one real token of each run of `size` tokens.

    Args:
        call: The call, in block order.
        size: Tokens per run; the last one may have fewer.
        place: Where among the real tokens of a run, 0 to below 1: one number for all, or (runs,).

    Returns:
        (B or 1, runs) int64, positions in block order. A run without real tokens gives any of its
        own.
    """
    length, valid = call.visual.key.shape[1], call.visual.valid
    device = call.visual.key.device
    start = torch.arange(0, length, size, device=device)
    stop = (start + size).clamp(max=length)
    if valid is None:
        return (start + ((stop - start) * place).long())[None]
    before = torch.nn.functional.pad(valid.cumsum(1), (1, 0))  # real tokens before each position
    first, count = before[:, start], before[:, stop] - before[:, start]
    wanted = first + (count * place).long() + 1
    token = torch.searchsorted(before, wanted.contiguous()) - 1
    return torch.where(count > 0, token, start)


def at_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Reads (B, N, H, D) at (B or 1, R) positions: (B, H, R, D) fp32."""
    batch, _, heads, channels = tokens.shape
    if len(positions) == 1:
        return tokens[:, positions[0]].transpose(1, 2).float()
    index = positions[:, :, None, None].expand(batch, -1, heads, channels)
    return tokens.gather(1, index).transpose(1, 2).float()
