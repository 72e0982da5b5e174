"""Block statistics, and the attention between blocks that they predict.

A block mean stands for its n tokens, so its logit gets + log n: the softmax over blocks and text
tokens then has the weights that the token softmax would have if the tokens of a block were
equal. This is the reallocation of "Rectified SpaAttn" (2025, https://arxiv.org/abs/2511.19835)
in a form that is also exact for ragged and partly padded blocks. Everything is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffaccel import kernels
from diffaccel.kernels import BlockStatistics

# Elements that one step holds in fp32: for statistics on a CPU what fits a cache, for the block
# attention what fills a device.
_STEP_ELEMENTS_CPU = 1 << 20
_STEP_ELEMENTS = 1 << 26


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    valid: Tensor | None = None,
    *,
    needs_value: bool = True,
    needs_spread: bool = True,
    needs_variance: bool = False,
) -> BlockStatistics:
    """Summarises runs of `block` tokens; the last run may be shorter.

    Args:
        query: (B, N, H, D) visual tokens in block order, fp16, bf16 or fp32.
        key: (B, N, H, D).
        value: (B, N, H, D).
        block: Tokens per block, at least 1.
        valid: (B, N) bool, True for real tokens. Padded tokens may hold NaN.
        needs_value: Whether to compute value means.
        needs_spread: Whether to compute the deviations of query and key.
        needs_variance: Whether to compute the variance of key.
    """
    return kernels.block_statistics(
        query,
        key,
        value,
        block,
        valid,
        needs_value=needs_value,
        needs_spread=needs_spread,
        needs_variance=needs_variance,
        step_elements=_STEP_ELEMENTS_CPU,
    )


def block_attention(
    statistics: BlockStatistics,
    text_key: Tensor,
    text_valid: Tensor | None,
    scale: float,
    rows: slice = slice(None),
) -> Tensor:
    """Predicts how much attention each query block pays to each key block and to the text.

    Args:
        statistics: Of the visual blocks.
        text_key: (B, T, H, D) keys that every query sees exactly; T may be 0.
        text_valid: (B, T) bool or None.
        scale: Factor on the logits.
        rows: Which query blocks to compute.

    Returns:
        (B, H, rows, NB + 1) fp32. Each row sums to 1, its last entry is all text together; a
        fully padded block has 0, and a sample without any valid key has zeros everywhere.
    """
    query = statistics.query_mean[:, :, rows] * scale
    logits = query @ statistics.key_mean.transpose(-1, -2)
    logits += statistics.counts.log()[:, None, None, :]
    text_logits = query @ text_key.float().permute(0, 2, 3, 1)
    if text_valid is not None:
        text_logits.masked_fill_(~text_valid[:, None, None, :], -torch.inf)
    text_logit = text_logits.logsumexp(-1, keepdim=True)
    weights = torch.cat([logits, text_logit], dim=-1).softmax(-1)
    # Only padding can leave a row without any key.
    return weights if text_valid is None else weights.nan_to_num_(nan=0.0)


def row_steps(statistics: BlockStatistics, text_length: int) -> Iterator[slice]:
    """Splits the query blocks into runs whose block attention fits one step of work."""
    batch, heads, blocks, _ = statistics.query_mean.shape
    step = max(1, _STEP_ELEMENTS // (batch * heads * (blocks + text_length + 1)))
    return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))
