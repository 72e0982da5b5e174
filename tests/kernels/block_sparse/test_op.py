"""Block-sparse attention on the CPU against the fp64 oracle, and the laws that it keeps."""

from pathlib import Path

import pytest
import torch

from diffaccel.kernels import (
    BlockSparseCall,
    Centroids,
    block_sparse_attention,
    merge_attention,
    reference,
)

# lengths 63, 111 and 1000 leave ragged blocks; each head dim and dtype is in some case
CASES = [
    pytest.param(*case, id="B{}-N{}-M{}-H{}-D{}-{}x{}-{}".format(*case[:7], str(case[7])[6:]))
    for case in [
        (1, 63, 63, 1, 64, 16, 16, torch.float32),
        (3, 111, 111, 2, 40, 16, 32, torch.float32),
        (1, 1000, 1000, 2, 128, 128, 128, torch.float32),
        (2, 111, 63, 3, 72, 32, 16, torch.bfloat16),
        (1, 63, 111, 2, 80, 50, 37, torch.float16),
        (1, 1000, 300, 1, 96, 64, 64, torch.bfloat16),
        (2, 200, 333, 2, 256, 64, 32, torch.float32),
    ]
]


@pytest.mark.parametrize("batch,queries,keys,heads,dim,block_q,block_k,dtype", CASES)
def test_random_lists_match_the_oracle(
    batch, queries, keys, heads, dim, block_q, block_k, dtype,
    problems, assert_close_to_oracle, poisoned_empty,
):  # fmt: skip
    tokens = problems.random_tokens(batch, queries, keys, heads, dim, dtype)
    key_blocks = -(-keys // block_k)
    lists = problems.random_lists(
        batch, heads, -(-queries // block_q), key_blocks, min(6, key_blocks)
    )
    blocks = {"block_q": block_q, "block_k": block_k}
    output, lse = block_sparse_attention(*tokens, *lists, **blocks, return_lse=True)
    expected, expected_lse, _ = reference.block_sparse_attention(
        BlockSparseCall(*tokens, *lists, **blocks)
    )
    mask = reference.block_mask(*lists, **blocks, queries=queries, keys=keys)
    assert_close_to_oracle(output, expected, problems.masked_sdpa(*tokens, mask))
    assert output.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert (output[lse == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_everything_at_once_matches_the_oracle(problems, assert_close_to_oracle, dtype):
    """Three samples of different valid length, NaN in the padding, text keys, epilogue."""
    batch, queries, keys, heads, dim, block = 3, 111, 150, 2, 72, 32
    query, key, value = problems.random_tokens(batch, queries, keys, heads, dim, dtype)
    _, text_key, text_value = problems.random_tokens(batch, 1, 9, heads, dim, dtype, seed=1)
    is_key = torch.arange(keys) < torch.tensor([[150], [70], [3]])
    is_text = torch.arange(9) < torch.tensor([[9], [0], [4]])
    for tensor, mask in ((key, is_key), (value, is_key), (text_key, is_text)):
        tensor[~mask] = torch.nan
    lists = problems.random_lists(batch, heads, 4, 5, 4)
    arguments = dict(
        block_q=block,
        block_k=block,
        scale=0.3,
        key_padding_mask=is_key,
        extra_key=text_key,
        extra_value=text_value,
        extra_padding_mask=is_text,
        row_scale=torch.rand(batch, heads, 4),
        row_bias=torch.randn(batch, heads, 4, dim),
    )
    output, lse = block_sparse_attention(query, key, value, *lists, **arguments, return_lse=True)
    expected, expected_lse, _ = reference.block_sparse_attention(
        BlockSparseCall(query, key, value, *lists, **arguments)
    )
    assert_close_to_oracle(output, expected)
    assert (expected_lse == -torch.inf).any(), "the case must hold a row without keys"
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_variance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_centroids_of_the_blocks_left_out_match_the_oracle(
    problems, assert_close_to_oracle, dtype, with_variance
):
    """Summaries beside masks, text and empty rows; the last sample has neither keys nor text."""
    batch, tokens, heads, dim, block = 3, 111, 2, 40, 16
    query, key, value = problems.random_tokens(batch, tokens, tokens, heads, dim, dtype)
    _, text_key, text_value = problems.random_tokens(batch, 1, 9, heads, dim, dtype, seed=1)
    is_key = torch.arange(tokens) < torch.tensor([[111], [70], [0]])
    is_text = torch.arange(9) < torch.tensor([[9], [0], [0]])
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(3, batch, heads, 7, dim, generator=generator)
    log_count = torch.randn(batch, heads, 7, generator=generator)
    log_count[1, :, 5:] = log_count[2] = -torch.inf
    arguments = dict(
        block_q=block,
        block_k=block,
        key_padding_mask=is_key,
        extra_key=text_key,
        extra_value=text_value,
        extra_padding_mask=is_text,
        centroids=Centroids(*drawn[:2], log_count, drawn[2].square() if with_variance else None),
    )
    lists = problems.random_lists(batch, heads, 7, 7, 7)
    output, lse, tail = block_sparse_attention(
        query, key, value, *lists, **arguments, return_lse=True, return_tail=True
    )
    expected, expected_lse, expected_tail = reference.block_sparse_attention(
        BlockSparseCall(query, key, value, *lists, **arguments)
    )
    assert_close_to_oracle(output, expected)
    torch.testing.assert_close(tail.double(), expected_tail, atol=2e-6, rtol=1e-5)
    assert (tail[2] == 0).all() and (tail[:2] > 0).any()
    assert (expected_lse[2] == -torch.inf).all() and expected_lse[:2].isfinite().all()
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def summaries(blocks=7, heads=2, dim=32):
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(3, 1, heads, blocks, dim, generator=generator)
    log_count = torch.randn(1, heads, blocks, generator=generator)
    return Centroids(*drawn[:2], log_count, drawn[2].square())


def test_log_counts_may_be_a_view_over_the_heads(problems):
    tokens = problems.random_tokens(1, 111, 111, 2, 32)
    lists = problems.random_lists(1, 2, 7, 7, 3)
    arguments = {"block_q": 16, "block_k": 16, "return_tail": True}
    centroids = summaries()
    view = centroids.log_count[:, :1].expand(1, 2, 7)
    assert view.stride(1) == 0
    shared, copied = (
        block_sparse_attention(
            *tokens, *lists, **arguments, centroids=centroids._replace(log_count=log_count)
        )
        for log_count in (view, view.contiguous())
    )
    assert all(map(torch.equal, shared, copied))
    own = block_sparse_attention(*tokens, *lists, **arguments, centroids=centroids)
    assert torch.equal(own[0][:, :, 0], shared[0][:, :, 0])
    assert not torch.equal(own[1][:, :, 1], shared[1][:, :, 1])


def test_the_tail_is_the_share_of_the_centroids(problems):
    """Values of 0 at tokens and 1 at centroids make the output the tail share."""
    query, key, value = problems.random_tokens(1, 111, 111, 2, 32)
    lists = problems.random_lists(1, 2, 7, 7, 7)
    lists[1][0, 0, :3] = torch.tensor([0, 7, 3])
    centroids = summaries()
    centroids = centroids._replace(value=torch.ones_like(centroids.value))
    output, tail = block_sparse_attention(
        query, key, torch.zeros_like(value), *lists, block_q=16, block_k=16,
        centroids=centroids, return_tail=True,
    )  # fmt: skip
    torch.testing.assert_close(output, tail.unsqueeze(-1).expand_as(output))
    assert ((tail[0, :16, 0] - 1).abs() < 1e-6).all() and (tail <= 1).all()
    everywhere = lists[0][0, 0, 1].tolist() == list(range(7))
    assert everywhere and (tail[0, 16:32, 0] == 0).all()
    assert ((tail[0, 32:48, 0] > 0) & (tail[0, 32:48, 0] < 1)).all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_tail_that_is_not_finite_is_nan(problems, wrong, is_masked):
    lists = problems.random_lists(1, 2, 7, 7, 3)
    lists[1][0, :, 2] = 0
    mask = torch.arange(111).unsqueeze(0) < (100 if is_masked else 111)
    for part in ("query", "key", "log_count"):
        query, key, value = problems.random_tokens(1, 111, 111, 2, 32)
        centroids = summaries()
        if part == "query":
            query[0, 40, 0] = wrong
        elif part == "key":
            centroids.key[0, 0, 2] = wrong
        else:
            centroids.log_count[0, 0, 2] = torch.nan
        output, tail = block_sparse_attention(
            query, key, value, *lists, block_q=16, block_k=16, key_padding_mask=mask,
            centroids=centroids, return_tail=True,
        )  # fmt: skip
        assert tail[0, 40, 0].isnan() and tail[:, :, 1].isfinite().all()
        assert torch.equal(tail.isnan(), output.isnan().any(-1)), part


def test_full_list_is_dense(problems, assert_close_to_oracle):
    tokens = problems.random_tokens(2, 111, 111, 2, 64)
    lists = problems.full_lists(2, 2, 4, 4)
    output = block_sparse_attention(*tokens, *lists, block_q=32, block_k=32)
    expected, _ = reference.attention(*tokens)
    twin = problems.masked_sdpa(*tokens, torch.ones(2, 2, 111, 111, dtype=torch.bool))
    assert_close_to_oracle(output, expected, twin)


def test_one_empty_row_is_zero_and_leaves_the_others_alone(problems):
    tokens = problems.random_tokens(1, 64, 64, 2, 32)
    indices, counts = problems.full_lists(1, 2, 4, 4)
    full = block_sparse_attention(*tokens, indices, counts, block_q=16, block_k=16)
    counts[0, 1, 2] = 0
    output, lse = block_sparse_attention(
        *tokens, indices, counts, block_q=16, block_k=16, return_lse=True
    )
    assert (output[0, 32:48, 1] == 0).all() and (lse[0, 32:48, 1] == -torch.inf).all()
    assert torch.isfinite(lse).sum() == lse.numel() - 16
    full[0, 32:48, 1] = 0
    torch.testing.assert_close(output, full)


def test_no_list_at_all_leaves_only_the_bias(problems):
    tokens = problems.random_tokens(1, 20, 20, 1, 16)
    bias = torch.randn(1, 1, 2, 16)
    empty = torch.zeros(1, 1, 2, 0, dtype=torch.int32), torch.zeros(1, 1, 2, dtype=torch.int32)
    output = block_sparse_attention(*tokens, *empty, block_q=16, block_k=16, row_bias=bias)
    torch.testing.assert_close(output[0, :, 0], bias[0, 0].repeat_interleave(16, 0)[:20])


@pytest.mark.parametrize("junk", [-1, 2**31 - 1])
def test_unused_entries_are_never_read(problems, junk):
    tokens = problems.random_tokens(1, 100, 100, 2, 32)
    indices, counts = problems.random_lists(1, 2, 7, 7, 5)
    expected = block_sparse_attention(*tokens, indices, counts, block_q=16, block_k=16)
    poisoned = indices.masked_fill(torch.arange(5) >= counts.unsqueeze(-1), junk)
    output = block_sparse_attention(*tokens, poisoned, counts, block_q=16, block_k=16)
    assert torch.equal(output, expected)


def test_constant_values_stay_constant(problems):
    query, key, value = problems.random_tokens(1, 111, 111, 2, 40)
    lists = problems.random_lists(1, 2, 4, 4, 3, least=1)
    value = value[:, :1].expand_as(value)
    output = block_sparse_attention(query, key, value, *lists, block_q=32, block_k=32)
    torch.testing.assert_close(output, value, atol=1e-5, rtol=1e-5)


def test_permuting_heads_and_samples_permutes_the_output(problems):
    query, key, value = problems.random_tokens(2, 70, 70, 3, 32)
    indices, counts = problems.random_lists(2, 3, 5, 5, 4)
    output = block_sparse_attention(query, key, value, indices, counts, block_q=16, block_k=16)
    heads, samples = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    moved = [tensor[samples][:, :, heads] for tensor in (query, key, value)]
    lists = indices[samples][:, heads], counts[samples][:, heads]
    permuted = block_sparse_attention(*moved, *lists, block_q=16, block_k=16)
    torch.testing.assert_close(permuted, output[samples][:, :, heads], atol=1e-6, rtol=1e-5)


def test_split_lists_merge_to_one(problems):
    tokens = problems.random_tokens(1, 111, 111, 2, 64)
    indices, counts = problems.full_lists(1, 2, 4, 4)
    blocks = {"block_q": 32, "block_k": 32, "return_lse": True}
    whole, whole_lse = block_sparse_attention(*tokens, indices, counts, **blocks)
    parts = [
        block_sparse_attention(
            *tokens, indices[..., part], torch.full_like(counts, size), **blocks
        )
        for part, size in ((slice(0, 1), 1), (slice(1, 4), 3))
    ]
    merged, lse = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


def test_lists_broadcast_over_samples_and_heads(problems):
    tokens = problems.random_tokens(2, 70, 70, 3, 32)
    indices, counts = problems.random_lists(1, 1, 5, 5, 4)
    blocks = {"block_q": 16, "block_k": 16}
    shared = block_sparse_attention(*tokens, indices, counts, **blocks)
    own = indices.repeat(2, 3, 1, 1), counts.repeat(2, 3, 1)
    assert torch.equal(shared, block_sparse_attention(*tokens, *own, **blocks))


def test_views_of_a_fused_projection_give_the_same(problems):
    tokens = problems.random_tokens(2, 70, 70, 3, 32)
    lists = problems.random_lists(2, 3, 5, 5, 4)
    fused = torch.cat([tensor.flatten(2) for tensor in tokens], dim=2)
    views = [part.unflatten(2, (3, 32)) for part in fused.chunk(3, dim=2)]
    assert not views[0].is_contiguous()
    blocks = {"block_q": 16, "block_k": 16}
    output = block_sparse_attention(*views, *lists, **blocks)
    assert torch.equal(output, block_sparse_attention(*tokens, *lists, **blocks))


def test_inputs_stay_untouched(problems):
    tokens = problems.random_tokens(1, 48, 48, 1, 32)
    lists = problems.random_lists(1, 1, 3, 3, 2)
    before = [tensor.clone() for tensor in (*tokens, *lists)]
    block_sparse_attention(*tokens, *lists, block_q=16, block_k=16)
    assert all(map(torch.equal, before, (*tokens, *lists)))


@pytest.mark.slow
def test_memory_follows_the_kept_blocks(run_worker):
    """A dense score matrix of this size would be 1 GiB; 2 of 128 blocks keep it far below.

    The peak is that of a whole process, so that one of its own, without a peak so far, is needed.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc")
    assert int(run_worker("memory_worker.py", timeout=300)) < 256 << 10
