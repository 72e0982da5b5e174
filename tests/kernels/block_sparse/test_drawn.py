"""Block-sparse attention on drawn problems, against the fp64 oracle."""

import dataclasses

import pytest
import torch

from diffaccel.kernels import BlockSparseCall, block_sparse_attention, reference
from diffaccel.kernels.block_sparse.cpu import block_sparse_cpu


def sdpa_twin(problems, tokens, arguments):
    """What SDPA makes of a problem in the same dtype, None with centroids."""
    if "centroids" in arguments:
        return None
    query, key, value, indices, counts = tokens
    batch, queries, heads, _ = query.shape
    keys, text = key.shape[1], arguments.get("extra_key", key[:, :0])
    blocks = {name: arguments[name] for name in ("block_q", "block_k")}
    lists = indices.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
    mask = reference.block_mask(*lists, **blocks, queries=queries, keys=keys)
    parts = [mask, mask.new_ones(batch, heads, queries, text.shape[1])]
    for part, name in zip(parts, ("key_padding_mask", "extra_padding_mask"), strict=True):
        if name in arguments:
            part &= arguments[name][:, None, None]
    key = torch.cat([key, text], 1).nan_to_num()
    value = torch.cat([value, arguments.get("extra_value", value[:, :0])], 1).nan_to_num()
    output = problems.masked_sdpa(query, key, value, torch.cat(parts, -1), arguments["scale"])
    if "row_scale" not in arguments:
        return output
    factor, bias = (
        arguments[name].repeat_interleave(blocks["block_q"], 2)[:, :, :queries].transpose(1, 2)
        for name in ("row_scale", "row_bias")
    )
    return (output * factor.unsqueeze(-1) + bias).to(output.dtype)


@pytest.mark.drawn(300)
def test_drawn_problems_match_the_oracle(problems, assert_close_to_oracle, poisoned_empty, seed):
    tokens, arguments = problems.block_sparse_problem(seed)
    asked = {"return_lse": True, "return_tail": "centroids" in arguments}
    output, lse, *tail = block_sparse_attention(*tokens, **arguments, **asked)
    expected, expected_lse, expected_tail = reference.block_sparse_attention(
        BlockSparseCall(*tokens, **arguments)
    )
    assert output.dtype == tokens[0].dtype and output.shape == tokens[0].shape
    assert_close_to_oracle(output, expected, sdpa_twin(problems, tokens, arguments))
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)
    for share in tail:
        assert share.dtype == torch.float32 and (share[lse == -torch.inf] == 0).all()
        torch.testing.assert_close(share.double(), expected_tail, atol=2e-6, rtol=1e-5)


@pytest.mark.drawn(60)
def test_the_path_for_bf16_units_matches_the_oracle(
    problems, assert_close_to_oracle, poisoned_empty, seed
):
    """Taken on processors with AMX; any other computes the same, slowly."""
    tokens, arguments = problems.block_sparse_problem(seed, torch.bfloat16)
    asked = {"return_tail": "centroids" in arguments}
    call = expanded(BlockSparseCall(*tokens, **arguments, **asked))
    output, _, tail = block_sparse_cpu(call, has_units=True)
    expected, _, expected_tail = reference.block_sparse_attention(call)
    assert_close_to_oracle(output, expected, sdpa_twin(problems, tokens, arguments))
    if asked["return_tail"]:
        torch.testing.assert_close(tail.double(), expected_tail, atol=2e-6, rtol=1e-5)


def test_the_path_for_bf16_units_is_another_one(problems):
    """Its weights are rounded to bf16 before they meet the values."""
    tokens = problems.random_tokens(1, 64, 64, 2, 32, torch.bfloat16)
    call = BlockSparseCall(*tokens, *problems.full_lists(1, 2, 4, 4), 16, 16)
    fused, plain = (block_sparse_cpu(call, has_units=has_units)[0] for has_units in (True, False))
    assert not torch.equal(fused, plain)


def expanded(call):
    """The call with lists of its own for every sample and head, as backends take it."""
    batch, _, heads, _ = call.query.shape
    lists = call.indices.expand(batch, heads, -1, -1), call.counts.expand(batch, heads, -1)
    return dataclasses.replace(call, indices=lists[0], counts=lists[1])
