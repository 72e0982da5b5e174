"""Merging of attention results over disjoint key sets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.kernels.arguments import compute_dtype


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combines attention over disjoint key sets into attention over their union.

    Exact up to rounding, for any number of parts. A row that no part attends stays 0 with
    lse -inf; the output of a part whose lse is -inf is never read into the result.

    Args:
        outputs: Partial results, each (B, N, H, D), any float dtype, one dtype for all.
        lses: Natural-log softmax normalisers including the scale, each (B, N, H), fp32.

    Returns:
        The merged output (B, N, H, D) in the input dtype, and its lse (B, N, H), fp32.

    Raises:
        ValueError: If there is no part, or the parts differ in number, shape or dtype.
    """
    _check_parts(outputs, lses)
    peak = lses[0].float()
    for lse in lses[1:]:
        peak = torch.maximum(peak, lse.float())
    pivot = peak.masked_fill(peak == -torch.inf, 0.0)

    total = torch.zeros_like(pivot)
    wide = compute_dtype(outputs[0])
    merged = torch.zeros_like(outputs[0], dtype=wide)
    for output, lse in zip(outputs, lses, strict=True):
        weight = torch.exp(lse.float() - pivot)
        part = output.to(wide) * weight.unsqueeze(-1)
        # an empty part may hold anything, and 0 * NaN is NaN
        merged += part.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        total += weight
    merged = merged / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return merged.to(outputs[0].dtype), pivot + torch.log(total)


def _check_parts(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            "merge_attention needs one lse per output and at least one part, got "
            f"{len(outputs)} outputs and {len(lses)} lses; pass both lists with equal length"
        )
    shape, dtype = outputs[0].shape, outputs[0].dtype
    for output, lse in zip(outputs, lses, strict=True):
        if output.shape != shape or output.dtype != dtype or lse.shape != shape[:-1]:
            raise ValueError(
                "all parts must share one shape (B, N, H, D) and one dtype, with lse (B, N, H), "
                f"got output {tuple(output.shape)} {output.dtype} with lse {tuple(lse.shape)} "
                f"beside {tuple(shape)} {dtype}; compute every part for the same queries"
            )
