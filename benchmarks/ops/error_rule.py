"""The gate: an op whose error is too large has no speed.

An output may be off from the fp64 oracle by twice what SDPA of the same dtype with the same mask
is off, plus a rounding. The tests apply the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffaccel.benchmarks.ops.block_lists import BlockPlan
from diffaccel.benchmarks.ops.problems import Inputs
from diffaccel.kernels import BlockSparseCall, Centroids, reference

ROUNDING = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
WITHOUT_TWIN = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Limits where SDPA has no such problem, on inputs of unit variance."""
SAMPLED_ROWS = 256  # of fewer, the largest error depends on which


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far an output is from the oracle.

    Args:
        error: Largest absolute difference.
        limit: What it may be.
    """

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN never is."""
        return self.error <= self.limit


def error_limit(dtype: torch.dtype, twin_error: float | None = None) -> float:
    """What the largest error of an output may be.

    Args:
        dtype: Of the output.
        twin_error: Largest error of SDPA on the same problem; None where it has no such problem.
    """
    return WITHOUT_TWIN[dtype] if twin_error is None else 2 * twin_error + ROUNDING[dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What an op ought to compute on one set of inputs.

    Args:
        inputs: In the token order of the op's output.
        plan: Lists and corrections, of a block-sparse op.
        block: Tokens per block, of a block-sparse op.
        mask: Gives (len(rows), N) bool for query rows, of another sparse op; None for all keys.
    """

    inputs: Inputs
    plan: BlockPlan | None = None
    block: int = 1
    mask: Callable[[Tensor], Tensor] | None = None


def judge(output: Tensor, expected: Expected, most_rows: int | None = None) -> Verdict:
    """Applies the error rule.

    Args:
        output: (1, N, H, D).
        expected: What it ought to be.
        most_rows: Check only so many rows, spread from the first to the last, of the first and
            the last head. None checks everything.
    """
    tokens, heads = output.shape[1:3]
    rows, picked = torch.arange(tokens, device=output.device), slice(None)
    if most_rows is not None:
        picked = slice(None, None, max(1, heads - 1))
        if most_rows < tokens:
            rows = torch.linspace(0, tokens - 1, most_rows, device=output.device).round().long()
    problem = _Rows(expected, rows, picked)
    exact, exact_uncorrected = problem.exact()
    twin = problem.twin()
    sample = output[:, rows][:, :, picked].cpu().double()
    error = (sample - exact).abs().max().item()
    twin_error = (twin.cpu().double() - exact_uncorrected).abs().max().item()
    return Verdict(error, error_limit(output.dtype, twin_error))


class _Rows:
    """Some rows and heads of a problem, small enough for a dense oracle."""

    def __init__(self, expected: Expected, rows: Tensor, heads: slice) -> None:
        inputs = expected.inputs
        self.query = inputs.query[:, rows][:, :, heads]
        self.key, self.value = inputs.key[:, :, heads], inputs.value[:, :, heads]
        self.text: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if inputs.text_key is not None and inputs.text_value is not None:
            self.text = inputs.text_key[:, :, heads], inputs.text_value[:, :, heads]
        self.block, self.plan = expected.block, None
        if expected.plan is not None:
            self.plan = _sliced(expected.plan, rows // expected.block, heads)
        self.visual_mask = None if expected.mask is None else expected.mask(rows)[None, None]

    def exact(self) -> tuple[Tensor, Tensor]:
        """The oracle, with and without the summaries of left-out blocks, in fp64 on the CPU.

        SDPA knows no summaries, so its own error is taken on the problem without them.
        """
        if self.plan is None:
            mask = self._mask()
            query, key, value = (x.cpu() for x in (self.query, *self._keys()))
            output, _ = reference.attention(query, key, value, _on_cpu(mask))
            return output, output
        plan = BlockPlan(*map(_on_cpu, self.plan))
        query, key, value = (x.cpu() for x in (self.query, self.key, self.value))
        call = partial(
            BlockSparseCall,
            query,
            key,
            value,
            plan.indices,
            plan.counts,
            block_q=1,
            block_k=self.block,
            extra_key=_on_cpu(self.text[0]),
            extra_value=_on_cpu(self.text[1]),
            row_scale=plan.row_scale,
            row_bias=plan.row_bias,
        )
        plain, _, _ = reference.block_sparse_attention(call())
        if plan.centroids is None:
            return plain, plain
        full, _, _ = reference.block_sparse_attention(call(centroids=plan.centroids))
        return full, plain

    def twin(self) -> Tensor:
        """SDPA of the same dtype with the same mask, (1, R, H, D)."""
        query, key, value = (x.transpose(1, 2) for x in (self.query, *self._keys()))
        output = scaled_dot_product_attention(query, key, value, attn_mask=self._mask())
        row_scale, row_bias = (None, None) if self.plan is None else self.plan[2:4]
        if row_scale is not None and row_bias is not None:
            scaled = output.float() * row_scale[..., None] + row_bias
            output = scaled.to(output.dtype)
        return output.transpose(1, 2)

    def _keys(self) -> tuple[Tensor, Tensor]:
        if self.text[0] is None:
            return self.key, self.value
        text_key, text_value = self.text
        return torch.cat((text_key, self.key), 1), torch.cat((text_value, self.value), 1)

    def _mask(self) -> Tensor | None:
        """(1, H or 1, R, T + N) bool, or None for all keys."""
        mask = self.visual_mask
        if self.plan is not None:
            mask = reference.block_mask(
                self.plan.indices.cpu(), self.plan.counts.cpu(), block_q=1, block_k=self.block,
                queries=self.query.shape[1], keys=self.key.shape[1],
            ).to(self.query.device)  # fmt: skip
        if mask is None or self.text[0] is None:
            return mask
        return torch.nn.functional.pad(mask, (self.text[0].shape[1], 0), value=True)


def _on_cpu(part: Any) -> Any:
    """The same on the CPU, where the oracle's many small steps wait for no device."""
    if isinstance(part, Centroids):
        return Centroids(*(_on_cpu(x) for x in part))
    return None if part is None else part.cpu()


def _sliced(plan: BlockPlan, rows: Tensor, heads: slice) -> BlockPlan:
    def pick_heads(part: Any) -> Any:
        return None if part is None else part[:, heads]

    def pick(part: Any) -> Any:
        return None if part is None else pick_heads(part)[:, :, rows]

    centroids = plan.centroids
    if centroids is not None:
        centroids = Centroids(*(pick_heads(x) for x in centroids))
    return BlockPlan(
        pick(plan.indices), pick(plan.counts), pick(plan.row_scale), pick(plan.row_bias), centroids
    )
