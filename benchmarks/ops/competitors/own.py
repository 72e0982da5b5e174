"""The ops of this package, with random lists and with those of the methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from diffaccel.benchmarks.ops.block_lists import (
    BlockPlan,
    in_block_order,
    kept_pairs,
    random_plan,
    rounded,
    selected_plan,
    with_centroids,
)
from diffaccel.benchmarks.ops.competitors.base import Op, Prepared, always
from diffaccel.benchmarks.ops.error_rule import Expected
from diffaccel.benchmarks.ops.problems import Inputs, Problem
from diffaccel.benchmarks.ops.roofline import Work
from diffaccel.benchmarks.ops.shapes import Shape
from diffaccel.benchmarks.ops.windows import window_for, window_mask, window_pairs
from diffaccel.kernels import block_sparse_attention, neighborhood_attention
from diffaccel.layout import Grid
from diffaccel.methods import RectifiedSpaAttn, SparseAttn
from diffaccel.methods.block_sparse.base import BlockSparseMethod
from diffaccel.methods.block_sparse.order import token_order

_STRIDE = (2, 8, 8)  # of the windows that move by tiles, per axis


def _prepared_blocks(
    problem: Problem, ordered: Inputs, plan: BlockPlan, **steps: Callable[[], object]
) -> Prepared:
    plan, shape, block = rounded(plan, problem.dtype), problem.shape, problem.block

    def run() -> Tensor:
        output: Any = block_sparse_attention(
            ordered.query,
            ordered.key,
            ordered.value,
            plan.indices,
            plan.counts,
            block_q=block,
            block_k=block,
            extra_key=ordered.text_key,
            extra_value=ordered.text_value,
            row_scale=plan.row_scale,
            row_bias=plan.row_bias,
            centroids=plan.centroids,
        )
        return output

    pairs = kept_pairs(plan, shape.visual, shape.text, block)
    expected = Expected(ordered, plan, block)
    return Prepared(run, expected, pairs, extra=_extra_work(plan, shape), **steps)


def _extra_work(plan: BlockPlan, shape: Shape) -> Work:
    """Reading all that the plan holds; attending the summaries of all blocks."""
    parts = [plan.indices, plan.counts, plan.row_scale, plan.row_bias, *(plan.centroids or ())]
    flops = 0
    if plan.centroids is not None:  # a score, the variance's share of it, and the sum
        flops = 6 * shape.heads * shape.visual * plan.centroids.key.shape[2] * shape.dim
    return Work(flops, sum(part.nbytes for part in parts if part is not None))


def _random_blocks(problem: Problem, inputs: Inputs, centroids: bool) -> Prepared:
    """Random lists; the order of the tokens is left as it is, since it changes nothing."""
    plan = random_plan(problem, problem.seed)
    if centroids:
        plan = with_centroids(plan, problem, inputs)
    return _prepared_blocks(problem, inputs, plan)


def _selected_blocks(
    problem: Problem, inputs: Inputs, method: Callable[[Problem], BlockSparseMethod]
) -> Prepared:
    chosen, ordered = method(problem), in_block_order(inputs, problem)
    curve = token_order(problem.shape.grid, chosen.order, problem.block).to(problem.device)

    def order() -> None:
        moved = in_block_order(inputs, problem, chosen.order)
        torch.empty_like(moved.query).index_copy_(1, curve.order, moved.query)

    def index() -> BlockPlan:
        return selected_plan(chosen, problem, ordered)

    return _prepared_blocks(problem, ordered, index(), index=index, order=order)


def _sparse(problem: Problem) -> BlockSparseMethod:
    return SparseAttn(
        keep=problem.density,
        block=problem.block,
        order="hilbert",
        selector="pooled",
        corrector="none",
    )


def _rectified(correction: str, problem: Problem) -> BlockSparseMethod:
    # Without floor and neighbours the selection has the density that was asked for.
    return RectifiedSpaAttn(
        drop=1.0 - problem.density,
        p_remain=0.0,
        neighbors=False,
        block=problem.block,
        correction=correction,
    )


def _neighborhood(problem: Problem, inputs: Inputs, stride: Grid) -> Prepared:
    shape = problem.shape
    kernel = window_for(shape, problem.density)
    clamped = cast(Grid, tuple(map(min, stride, kernel)))
    query, key, value = (
        x.unflatten(1, shape.grid) for x in (inputs.query, inputs.key, inputs.value)
    )

    def run() -> Tensor:
        found: Any = neighborhood_attention(
            query,
            key,
            value,
            kernel,
            stride=clamped,
            extra_key=inputs.text_key,
            extra_value=inputs.text_value,
        )
        return found.flatten(1, 3)

    pairs = window_pairs(shape, kernel)
    return Prepared(run, Expected(inputs, mask=window_mask(shape, kernel, clamped)), pairs)


def _own(name: str, prepare: Callable[[Problem, Inputs], Prepared]) -> Op:
    return Op(name, "diffaccel", prepare, always)


OWN_OPS: dict[str, Op] = {
    "block-random": _own("block-sparse, random lists", partial(_random_blocks, centroids=False)),
    "block-random-centroids": _own(
        "block-sparse, random lists, centroids", partial(_random_blocks, centroids=True)
    ),
    "block-sparse": _own("block-sparse, SparseAttn", partial(_selected_blocks, method=_sparse)),
    "block-rectified": _own(
        "block-sparse, RectifiedSpaAttn",
        partial(_selected_blocks, method=partial(_rectified, "pooled")),
    ),
    "block-rectified-centroids": _own(
        "block-sparse, RectifiedSpaAttn, centroids",
        partial(_selected_blocks, method=partial(_rectified, "centroids")),
    ),
    "neighborhood": _own("neighborhood, stride 1", partial(_neighborhood, stride=(1, 1, 1))),
    "neighborhood-stride": _own("neighborhood, stride 8", partial(_neighborhood, stride=_STRIDE)),
}
