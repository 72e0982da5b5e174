"""Sparse competitors, imported at use: flex_attention, NATTEN, SpargeAttn."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from diffaccel.benchmarks.ops.block_lists import BlockPlan, kept_pairs, random_plan
from diffaccel.benchmarks.ops.competitors.base import Op, Prepared, needs_cuda_package
from diffaccel.benchmarks.ops.error_rule import Expected
from diffaccel.benchmarks.ops.problems import Inputs, Problem
from diffaccel.benchmarks.ops.shapes import GATE_SUFFIX
from diffaccel.benchmarks.ops.windows import window_for, window_mask, window_pairs
from diffaccel.kernels import listed_blocks
from diffaccel.layout import Grid


def flex_mask(plan: BlockPlan, visual: int, text: int, block: int) -> BlockMask:
    """The same pattern for flex_attention, over keys with the text behind the visual tokens.

    Blocks that are listed and full, or all text, need no mask inside the kernel; the ragged last
    visual block, which shares its block with the first text, and the ragged end do.
    """
    keys = visual + text
    key_blocks = -(-keys // block)
    listed = listed_blocks(plan.indices, plan.counts, key_blocks)
    start = torch.arange(key_blocks, device=listed.device) * block
    end = start + block
    is_full = (end <= visual) & listed | (start >= visual) & (end <= keys)
    is_partial = listed & ~is_full | (end > visual) & (start < keys) & ~is_full & (text > 0)

    def is_attended(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= visual) | listed[0, head, query // block, key // block]

    return BlockMask.from_kv_blocks(
        *_counted(is_partial),
        *_counted(is_full),
        BLOCK_SIZE=(block, block),
        mask_mod=is_attended,
        seq_lengths=(visual, keys),
        compute_q_blocks=False,
    )


def _counted(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices (chosen ones first, ascending) of a map of blocks."""
    order = chosen.int().sort(dim=-1, descending=True, stable=True).indices
    return chosen.sum(-1, dtype=torch.int32), order.int().contiguous()


@lru_cache(maxsize=1)
def _compiled(_shape_name: str, _dtype: torch.dtype) -> Callable[..., Tensor]:
    """Compiles afresh for each shape and dtype.

    After a few recompilations of one function PyTorch gives up and computes all scores.
    """
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def _prepare_flex(problem: Problem, inputs: Inputs) -> Prepared:
    plan, shape, block = random_plan(problem, problem.seed), problem.shape, problem.block
    mask = flex_mask(plan, shape.visual, shape.text, block)
    key, value = inputs.key, inputs.value
    if inputs.text_key is not None and inputs.text_value is not None:
        key = torch.cat([key, inputs.text_key], 1)
        value = torch.cat([value, inputs.text_value], 1)
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, key, value))
    compiled = _compiled(shape.name.removesuffix(GATE_SUFFIX), problem.dtype)

    def run() -> Tensor:
        return compiled(query, key, value, block_mask=mask).transpose(1, 2)

    pairs = kept_pairs(plan, shape.visual, shape.text, block)
    return Prepared(run, Expected(inputs, plan, block), pairs)


def _reason_against_flex(problem: Problem) -> str | None:
    if problem.device.type == "cuda":
        return None
    return "compiles for a while on a CPU, pass --flex-on-cpu to have it"


def _prepare_natten(problem: Problem, inputs: Inputs, stride: Grid) -> Prepared:
    from natten.functional import neighborhood_attention_generic

    shape = problem.shape
    kernel = window_for(shape, problem.density)
    clamped = tuple(map(min, stride, kernel))
    first = 1 if shape.grid[0] == 1 else 0  # NATTEN has no axis of length 1
    tokens = [x.unflatten(1, shape.grid[first:]) for x in (inputs.query, inputs.key, inputs.value)]
    extra = {}
    if inputs.text_key is not None:
        extra = {"additional_keys": inputs.text_key, "additional_values": inputs.text_value}

    def run() -> Tensor:
        found = neighborhood_attention_generic(
            *tokens, kernel_size=kernel[first:], stride=clamped[first:], **extra
        )
        return found.flatten(1, -3)

    pairs = window_pairs(shape, kernel)
    return Prepared(run, Expected(inputs, mask=window_mask(shape, kernel, stride)), pairs)


def _prepare_sparge(problem: Problem, inputs: Inputs) -> Prepared:
    """Its blocks are 128 x 64, or 64 x 128 on Hopper; ours of 128 are cut in halves."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    plan, shape, block = random_plan(problem, problem.seed), problem.shape, problem.block
    listed = listed_blocks(plan.indices, plan.counts, plan.counts.shape[-1]).to(torch.int8)
    is_hopper = torch.cuda.get_device_capability(problem.device)[0] == 9
    query_cuts, key_cuts = (
        (block // 64, block // 128) if is_hopper else (block // 128, block // 64)
    )
    mask = listed.repeat_interleave(query_cuts, 2).repeat_interleave(key_cuts, 3).contiguous()

    def run() -> Tensor:
        return block_sparse_sage2_attn_cuda(
            inputs.query, inputs.key, inputs.value,
            mask_id=mask, tensor_layout="NHD", output_dtype=problem.dtype,
        )  # fmt: skip

    pairs = kept_pairs(plan, shape.visual, 0, block)
    return Prepared(run, Expected(inputs, plan, block), pairs)


def _reason_against_sparge(problem: Problem) -> str | None:
    missing = needs_cuda_package("spas_sage_attn")(problem)
    if missing:
        return missing
    if problem.shape.text:
        return "has no way to attend text beside the lists"
    if problem.block % 128:
        return "needs blocks of 128 or a multiple"
    return None


def _reason_against_natten(problem: Problem) -> str | None:
    missing = needs_cuda_package("natten")(problem)
    if missing or min(window_for(problem.shape, problem.density)[-2:]) > 1:
        return missing
    return "needs windows of at least 2 tokens along each axis"


OTHER_SPARSE_OPS: dict[str, Op] = {
    "flex": Op("random lists", "flex_attention, compiled", _prepare_flex, _reason_against_flex),
    "natten": Op(
        "neighborhood, stride 1",
        "natten",
        partial(_prepare_natten, stride=(1, 1, 1)),
        _reason_against_natten,
    ),
    "natten-stride": Op(
        "neighborhood, stride 8",
        "natten",
        partial(_prepare_natten, stride=(2, 8, 8)),
        _reason_against_natten,
    ),
    "sparge": Op("random lists", "spas_sage_attn", _prepare_sparge, _reason_against_sparge),
}
