"""Merging partial results, dense attention, and laws of both over random cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from diffaccel.kernels import (
    BlockSparseCall,
    block_sparse_attention,
    dense_attention,
    merge_attention,
    reference,
)


def _parts(number, seed, shape=(1, 5, 2, 4)):
    generator = torch.Generator().manual_seed(seed)
    outputs = [torch.randn(shape, generator=generator) for _ in range(number)]
    lses = [torch.randn(shape[:-1], generator=generator) * 20 for _ in range(number)]
    for lse in lses:
        lse[torch.rand(lse.shape, generator=generator) < 0.3] = -torch.inf
    return outputs, lses


@settings(max_examples=30, deadline=None, derandomize=True)
@given(number=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_merge_matches_the_oracle_in_any_grouping(number, seed):
    outputs, lses = _parts(number, seed)
    merged, lse = merge_attention(outputs, lses)
    expected, expected_lse = reference.merge_attention(outputs, lses)
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    first = merge_attention(outputs[:1], lses[:1])
    if number > 1:
        rest = merge_attention(outputs[1:], lses[1:])
        regrouped = merge_attention([first[0], rest[0]], [first[1], rest[1]])
        torch.testing.assert_close(regrouped, (merged, lse), atol=1e-5, rtol=1e-5)


def test_merge_of_nothing_is_zero_and_ignores_the_output_of_an_empty_part():
    nan, lse = torch.full((1, 2, 1, 3), torch.nan), torch.full((1, 2, 1), -torch.inf)
    merged, merged_lse = merge_attention([nan, nan], [lse, lse])
    assert (merged == 0).all() and (merged_lse == -torch.inf).all()
    ones = torch.ones(1, 2, 1, 3)
    merged, merged_lse = merge_attention([nan, ones], [lse, torch.zeros(1, 2, 1)])
    assert torch.equal(merged, ones) and (merged_lse == 0).all()


def test_merge_refuses_parts_that_do_not_fit():
    ones, lse = torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match="one lse per output"):
        merge_attention([ones], [])
    with pytest.raises(ValueError, match="must share one shape"):
        merge_attention([ones, ones[:, :1]], [lse, lse[:, :1]])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 90),
    keys=st.integers(1, 90),
    block_q=st.integers(1, 40),
    block_k=st.integers(1, 40),
    text=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_any_lists_match_the_oracle(problems, queries, keys, block_q, block_k, text, seed):
    tokens = problems.random_tokens(1, queries, keys, 2, 8, seed=seed)
    _, extra_key, extra_value = problems.random_tokens(1, 1, text, 2, 8, seed=seed + 1)
    key_blocks = -(-keys // block_k)
    lists = problems.random_lists(1, 2, -(-queries // block_q), key_blocks, key_blocks, seed=seed)
    arguments = dict(
        block_q=block_q, block_k=block_k, extra_key=extra_key, extra_value=extra_value
    )
    output, lse = block_sparse_attention(*tokens, *lists, **arguments, return_lse=True)
    expected, expected_lse, _ = reference.block_sparse_attention(
        BlockSparseCall(*tokens, *lists, **arguments)
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 30) > 0], ids=["no-mask", "all-true"])
def test_dense_is_bit_identical_to_sdpa(problems, mask):
    query, key, value = problems.random_tokens(2, 20, 30, 3, 16)
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    expected = scaled_dot_product_attention(*heads_first, scale=0.2).transpose(1, 2)
    output = dense_attention(query, key, value, scale=0.2, key_padding_mask=mask)
    assert torch.equal(output, expected)


def test_dense_ignores_padded_keys(problems, assert_close_to_oracle):
    query, key, value = problems.random_tokens(3, 20, 30, 2, 16)
    is_key = torch.arange(30) < torch.tensor([[30], [11], [1]])
    key[~is_key], value[~is_key] = torch.nan, torch.nan
    output = dense_attention(query, key, value, key_padding_mask=is_key)
    expected, _ = reference.attention(query, key, value, is_key[:, None, None, :])
    assert_close_to_oracle(output, expected)


@pytest.mark.parametrize("is_masked", [False, True], ids=["no-mask", "masked"])
def test_dense_adds_the_bias_of_a_key(problems, assert_close_to_oracle, is_masked):
    """The logarithm of a count is as good as the key that many times."""
    query, key, value = problems.random_tokens(2, 20, 7, 2, 16)
    counts = torch.tensor([1, 3, 2, 1, 5, 1, 2])
    repeated = (x.repeat_interleave(counts, 1) for x in (key, value))
    valid = torch.tensor([[True] * 7, [True] * 5 + [False] * 2]) if is_masked else None
    mask = None if valid is None else valid.repeat_interleave(counts, 1)[:, None, None]
    expected, _ = reference.attention(query, *repeated, mask)
    output = dense_attention(
        query, key, value, key_padding_mask=valid, key_bias=counts.float().log()[None]
    )
    assert_close_to_oracle(output, expected)
