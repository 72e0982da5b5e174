"""One call of block selection: its arguments, and what they must look like."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.kernels.arguments import check_tensor
from diffaccel.kernels.backends import check_backend


@dataclass(frozen=True, slots=True, eq=False)
class SelectionCall:
    """The arguments of `diffaccel.kernels.select_blocks`, and two that few callers set.

    Args:
        budgets: (B, H) int32, blocks per row of each head in place of `top_k`, which they are
            clamped to (1 to `top_k`); B may be 1. None for `top_k` in every head.
        backend: "cpu", "triton", or None for the one that fits the device.
    """

    scores: Tensor
    top_k: int
    p_remain: float = 0.0
    text: Tensor | None = None
    forced: Tensor | None = None
    max_count: int | None = None
    return_kept: bool = False
    budgets: Tensor | None = None
    backend: str | None = None

    @property
    def width(self) -> int:
        """Width of the lists."""
        if self.max_count is not None:
            return self.max_count
        is_top_k = self.forced is None and self.p_remain == 0
        return self.top_k if is_top_k else self.scores.shape[-1]


def check(call: SelectionCall) -> None:
    """Checks everything that needs no tensor value.

    Raises:
        ValueError: If a shape, number or the backend does not fit.
        TypeError: If a dtype does not fit.
    """
    scores, budgets = call.scores, call.budgets
    if scores.dim() != 4 or 0 in scores.shape:
        raise ValueError(
            f"scores must be (B, H, R, NB) and not empty, got {tuple(scores.shape)}; "
            "pass one score per query block and key block"
        )
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be fp32, since others tie, got {scores.dtype}")
    batch, heads, rows, blocks = scores.shape
    text = "the summed mass of all text tokens of each row"
    check_tensor("text", call.text, torch.float32, (batch, heads, rows), text)
    check_tensor("forced", call.forced, torch.bool, (rows, blocks), "for all heads, True = keep")
    if budgets is not None and budgets.dtype != torch.int32:
        raise TypeError(f"budgets must be int32, blocks per row, got {budgets.dtype}; call .int()")
    if budgets is not None and budgets.shape not in ((batch, heads), (1, heads)):
        raise ValueError(
            f"budgets must be (B, H) = {(batch, heads)} or (1, H), got {tuple(budgets.shape)}; "
            "pass one number per head"
        )
    if not 1 <= call.top_k <= blocks:
        raise ValueError(f"top_k must lie in 1 to NB={blocks}, got top_k={call.top_k}; clamp it")
    if not 0.0 <= call.p_remain <= 1.0:
        raise ValueError(
            f"p_remain must lie in 0 to 1, got p_remain={call.p_remain}; it is the share of the "
            "attention mass that is kept at least, 0 to switch it off"
        )
    if not 1 <= call.width <= blocks:
        raise ValueError(
            f"max_count must lie in 1 to NB={blocks}, got max_count={call.max_count}; pass None "
            "for the smallest that is always enough"
        )
    tensors = {"scores": scores, "text": call.text, "forced": call.forced, "budgets": budgets}
    check_backend(call.backend, tensors)
