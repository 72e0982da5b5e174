"""The attention between blocks that their statistics predict.

A block mean stands for its n tokens, so its logit gets + log n: the softmax over blocks and text
tokens then has the weights that the token softmax would have if the tokens of a block were
equal. This is the reallocation of "Rectified SpaAttn" (2025, https://arxiv.org/abs/2511.19835)
in a form that is also exact for ragged and partly padded blocks. Everything is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels import BlockStatistics
from diffaccel.methods.inputs import ExactTokens

_STEP_ELEMENTS = 1 << 26  # that one step of the block attention holds in fp32: it fills a device
_PEAK = 1e38  # above all logits, and finite with a count added


def block_attention(
    statistics: BlockStatistics,
    exact: ExactTokens,
    scale: float,
    rows: slice | Tensor = slice(None),
) -> Tensor:
    """Predicts how much attention each query block pays to each key block and to the text.

    Args:
        statistics: Of the visual blocks.
        exact: What every query sees exactly.
        scale: Factor on the logits.
        rows: Which query blocks to compute.

    Returns:
        (B, H, rows, NB + 1) fp32. Each row sums to 1, its last entry is all text together; a
        fully padded block has 0, and a sample without any valid key has zeros everywhere.
        Blocks with scores that are not finite share all of a row, so that they are computed
        and show in the output.
    """
    query = statistics.query_mean[:, :, rows] * scale
    logits = block_logits(statistics, query)
    text_logits = _with_peaks(query @ exact.key.float().permute(0, 2, 3, 1))
    if exact.valid is not None:
        text_logits.masked_fill_(~exact.valid[:, None, None, :], -torch.inf)
    text_logit = text_logits.logsumexp(-1, keepdim=True)
    weights = torch.cat([logits, text_logit], dim=-1).softmax(-1)
    # Only padding can leave a row without any key.
    return weights if exact.valid is None else weights.nan_to_num_(nan=0.0)


def block_logits(statistics: BlockStatistics, query: Tensor) -> Tensor:
    """Logits of block means, each with the log of the number of its tokens.

    Args:
        statistics: Of the visual blocks.
        query: (B, H, R, D) fp32, scaled.

    Returns:
        (B, H, R, NB) fp32, -inf for blocks without tokens. What is not finite is very large.
    """
    logits = _with_peaks(query @ statistics.key_mean.transpose(-1, -2))
    return logits.add_(statistics.counts.log()[:, None, None, :])


def _with_peaks(logits: Tensor) -> Tensor:
    """Gives logits that are not finite the largest value, in place."""
    return logits.nan_to_num_(nan=_PEAK, posinf=_PEAK, neginf=_PEAK)


def row_steps(statistics: BlockStatistics, text_length: int) -> list[slice]:
    """Splits the query blocks into runs whose block attention fits one step of work."""
    batch, heads, blocks, _ = statistics.query_mean.shape
    step = max(1, _STEP_ELEMENTS // (batch * heads * (blocks + text_length + 1)))
    return [slice(start, min(start + step, blocks)) for start in range(0, blocks, step)]
