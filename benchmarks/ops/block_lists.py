"""Block lists to measure with: random ones, and those of the methods' own selectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.benchmarks.ops.problems import Inputs, Problem
from diffaccel.kernels import Centroids, block_statistics
from diffaccel.layout import TokenLayout
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.budgets import Ask
from diffaccel.methods.block_sparse.order import into_order, token_order
from diffaccel.methods.block_sparse.plan import planned
from diffaccel.methods.inputs import ExactTokens, Position, VisualTokens


class BlockPlan(NamedTuple):
    """What `block_sparse_attention` is told beside the tokens."""

    indices: Tensor
    counts: Tensor
    row_scale: Tensor | None = None
    row_bias: Tensor | None = None
    centroids: Centroids | None = None


def random_plan(problem: Problem, seed: int) -> BlockPlan:
    """Draws lists as long as those of the methods at this density."""
    heads, visual = problem.shape.heads, problem.shape.visual
    blocks = -(-visual // problem.block)
    kept = Ask(problem.density).per_row(blocks)
    generator = torch.Generator(problem.device).manual_seed(seed)
    ranking = torch.rand(1, heads, blocks, blocks, generator=generator, device=problem.device)
    indices = ranking.argsort(-1)[..., :kept].sort(-1).values.int().contiguous()
    counts = torch.full((1, heads, blocks), kept, dtype=torch.int32, device=problem.device)
    return BlockPlan(indices, counts)


def with_centroids(plan: BlockPlan, problem: Problem, ordered: Inputs) -> BlockPlan:
    """Adds the summaries of all key blocks, at full strength of the variance term."""
    statistics = block_statistics(
        ordered.query, ordered.key, ordered.value, problem.block,
        needs={"value_mean", "key_variance"},
    )  # fmt: skip
    centroids = Centroids(
        statistics.key_mean,
        statistics.value_mean,
        statistics.counts.log().unsqueeze(1).expand(statistics.key_mean.shape[:3]),
        statistics.key_variance,
    )
    return plan._replace(centroids=centroids)


def selected_plan(method: BlockSparseMethod, problem: Problem, ordered: Inputs) -> BlockPlan:
    """Runs a method's estimator, selector and corrector on tokens in block order."""
    text_key, text_value = ordered.text_key, ordered.text_value
    if text_key is None or text_value is None:
        text_key = text_value = ordered.key[:, :0]
    layout = TokenLayout.video(*problem.shape.grid)
    scale = problem.shape.dim**-0.5
    visual = VisualTokens(ordered.query, ordered.key, ordered.value, None, layout, scale)
    plan = planned(method, visual, ExactTokens(text_key, text_value, None), Position())
    centroids = None if plan.summary is None else plan.summary.centroids
    return BlockPlan(
        plan.chosen.indices, plan.chosen.counts, plan.row_scale, plan.row_bias, centroids
    )


def rounded(plan: BlockPlan, dtype: torch.dtype) -> BlockPlan:
    """Rounds the summaries to the dtype of the tokens.

    The kernels do so anyway; done beforehand, oracle and kernel read the same numbers.
    """
    if plan.centroids is None:
        return plan
    key, value, log_count, variance = plan.centroids
    if variance is not None:
        variance = variance.to(dtype).float()
    key, value = (part.to(dtype).float() for part in (key, value))
    return plan._replace(centroids=Centroids(key, value, log_count, variance))


def in_block_order(inputs: Inputs, problem: Problem, order: str = "hilbert") -> Inputs:
    """Copies the visual tokens along the curve that the methods use."""
    curve = token_order(problem.shape.grid, order, problem.block).to(problem.device)
    query, key, value = (into_order(x, curve) for x in (inputs.query, inputs.key, inputs.value))
    return Inputs(query, key, value, inputs.text_key, inputs.text_value)


def kept_pairs(plan: BlockPlan, tokens: int, text: int, block: int) -> int:
    """Counts the query-key pairs that are computed exactly, over all heads.

    Args:
        plan: Lists of `tokens` queries over as many keys.
        tokens: Visual tokens N; the last block may be ragged.
        text: Keys that every query attends beside its list.
        block: Tokens per block.
    """
    indices, counts = plan.indices.cpu(), plan.counts.cpu()
    blocks = counts.shape[-1]
    sizes = torch.full((blocks,), block, dtype=torch.int64)
    sizes[-1] = tokens - (blocks - 1) * block
    is_entry = torch.arange(indices.shape[-1]) < counts[..., None]
    keys = sizes[indices.long()].masked_fill(~is_entry, 0).sum(-1)
    return int((keys * sizes).sum()) + counts.shape[1] * tokens * text
