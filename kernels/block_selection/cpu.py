"""Selection of blocks in plain PyTorch: by sorting, and lists by a running count."""

import torch
from torch import Tensor

from diffaccel.kernels.block_selection.call import SelectionCall


def select_blocks_cpu(call: SelectionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call that was checked.

    Returns:
        indices, counts and kept, which has size 0 unless it was asked for.
    """
    kept = _kept_blocks(call)
    indices, counts = block_lists(kept, call.width)
    return indices, counts, kept if call.return_kept else kept.new_empty(0)


def block_lists(kept: Tensor, max_count: int) -> tuple[Tensor, Tensor]:
    """Turns a choice of blocks into the lists that the attention kernels read.

    Args:
        kept: (B, H, R, NB) bool.
        max_count: Width of the lists, at least the largest number of kept blocks.

    Returns:
        indices (B, H, R, max_count) int32, ascending, 0 beyond the count; counts (B, H, R)
        int32. No host synchronisation on CUDA.

    Raises:
        ValueError: If a row keeps more than `max_count` blocks, which only the CPU checks.
    """
    blocks = kept.shape[-1]
    position = kept.cumsum(-1, dtype=torch.int32)
    counts = position[..., -1].contiguous()
    if kept.device.type == "cpu" and int(counts.max()) > max_count:
        raise ValueError(
            f"max_count must be at least the blocks that a row keeps, got {max_count=} for "
            f"{int(counts.max())}; forced blocks and p_remain come on top of top_k"
        )
    # Blocks that are not kept all go to one surplus column, which is cut off.
    column = torch.where(kept, position - 1, max_count).long()
    ids = torch.arange(blocks, dtype=torch.int32, device=kept.device).expand_as(column)
    indices = torch.zeros(
        *kept.shape[:-1], max_count + 1, dtype=torch.int32, device=kept.device
    ).scatter_(-1, column, ids)
    return indices[..., :max_count].contiguous(), counts


def _kept_blocks(call: SelectionCall) -> Tensor:
    """The choice as a mask (B, H, R, NB) bool."""
    scores, top_k = call.scores.nan_to_num(nan=torch.inf, posinf=torch.inf), call.top_k
    if call.budgets is None:
        least = torch.full((1, 1, 1, 1), top_k, device=scores.device)
    else:
        least = call.budgets.long().clamp(1, top_k)[:, :, None, None]
    if call.p_remain > 0:
        ranked = scores.sort(-1, descending=True).values
        mass = ranked.cumsum(-1)
        if call.text is not None:
            mass = mass.add_(call.text.unsqueeze(-1))
        needed = (mass <= call.p_remain).sum(-1, keepdim=True) + 1
        needed = torch.maximum(needed, least).clamp_(max=scores.shape[-1])
    else:
        ranked = scores.topk(top_k, dim=-1).values
        needed = least.expand(*scores.shape[:3], 1)
    threshold = ranked.gather(-1, needed - 1)
    kept = scores > threshold
    tied = scores == threshold
    room = needed - kept.sum(-1, keepdim=True)
    kept |= tied & (tied.cumsum(-1, dtype=torch.int32) <= room)
    if call.forced is not None:
        kept |= call.forced
    return kept & (scores > 0)
