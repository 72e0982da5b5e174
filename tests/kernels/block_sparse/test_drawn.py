"""Block-sparse attention on drawn problems, against the fp64 oracle."""

import importlib

import pytest
import torch

from diffaccel.kernels import block_sparse_attention, reference

block_sparse_cpu = importlib.import_module("diffaccel.kernels.block_sparse.cpu")


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


@pytest.mark.parametrize("part", range(10))
def test_drawn_problems_match_the_oracle(
    cases, problems, assert_close_to_oracle, poisoned_empty, part
):
    for seed in cases(30):
        tokens, arguments = problems.block_sparse_problem(10 * seed + part)
        output, lse = block_sparse_attention(*tokens, **arguments, return_lse=True)
        expected, expected_lse = reference.block_sparse_attention(*tokens, **arguments)
        assert output.dtype == tokens[0].dtype and output.shape == tokens[0].shape
        assert_close_to_oracle(output, expected, sdpa_twin(problems, tokens, arguments))
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


def test_the_way_for_bf16_units_matches_the_oracle(
    cases, monkeypatch, problems, assert_close_to_oracle, poisoned_empty
):
    """Taken on processors with AMX; any other computes the same, slowly."""
    attend, calls = block_sparse_cpu._attend_fused, []
    monkeypatch.setattr(block_sparse_cpu, "has_bf16_units", lambda: True)
    monkeypatch.setattr(
        block_sparse_cpu, "_attend_fused", lambda *args: calls.append(args) or attend(*args)
    )
    for seed in cases(60):
        tokens, arguments = problems.block_sparse_problem(seed, torch.bfloat16)
        output = block_sparse_attention(*tokens, **arguments)
        expected, _ = reference.block_sparse_attention(*tokens, **arguments)
        assert_close_to_oracle(output, expected, sdpa_twin(problems, tokens, arguments))
    assert len(calls) > 60
