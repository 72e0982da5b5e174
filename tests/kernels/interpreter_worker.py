"""Runs the Triton kernel on CPU tensors under TRITON_INTERPRET=1 and checks it; silent when right.

Runs in its own process: the variable is read when `@triton.jit` runs. bf16 is left out, because
the interpreter computes on its bit patterns.
"""

import warnings

import torch
from kernel_problems import block_sparse_problem, masked_sdpa, random_lists, random_tokens

from diffaccel.kernels import BlockSparseCall, Centroids, block_sparse_attention, reference
from diffaccel.kernels.block_sparse.launch import block_sparse_triton
from diffaccel.kernels.block_sparse.tiles import tile_configs


def check_lists(dtype, queries, keys, dim, block_q, block_k):
    """Random lists without masks: the unmasked loop, ragged tails, uneven blocks."""
    query, key, value = random_tokens(1, queries, keys, 2, dim, dtype)
    fused = torch.stack([key, value], dim=1)
    key, value = fused[:, 0], fused[:, 1]
    key_blocks = -(-keys // block_k)
    lists = random_lists(1, 2, -(-queries // block_q), key_blocks, min(3, key_blocks))
    blocks = {"block_q": block_q, "block_k": block_k}
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    output, lse = block_sparse_attention(
        query, key, value, *lists, **blocks, return_lse=True, backend="triton"
    )
    torch.use_deterministic_algorithms(False)
    expected, expected_lse, _ = reference.block_sparse_attention(
        BlockSparseCall(query, key, value, *lists, **blocks)
    )
    mask = reference.block_mask(*lists, **blocks, queries=queries, keys=keys)
    twin = masked_sdpa(query, key, value, mask)
    error = (output.double() - expected).abs().max()
    limit = 2 * (twin.double() - expected).abs().max() + (5e-7 if dtype.itemsize == 4 else 5e-4)
    assert error <= limit, (dtype, dim, block_q, block_k, error, limit)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


def check_everything_at_once(dtype):
    """Padding with NaN, text keys, shared lists, epilogue, a sample without any key."""
    query, key, value = random_tokens(2, 40, 50, 2, 24, dtype)
    _, text_key, text_value = random_tokens(2, 1, 20, 2, 24, dtype, seed=1)
    is_key = torch.arange(50) < torch.tensor([[37], [0]])
    is_text = torch.arange(20) < torch.tensor([[17], [0]])
    for tensor, mask in ((key, is_key), (value, is_key), (text_key, is_text)):
        tensor[~mask] = torch.nan
    arguments = dict(
        block_q=32,
        block_k=16,
        key_padding_mask=is_key,
        extra_key=text_key,
        extra_value=text_value,
        extra_padding_mask=is_text,
        row_scale=torch.rand(2, 2, 2),
        row_bias=torch.randn(2, 2, 2, 24),
    )
    lists = random_lists(1, 1, 2, 4, 3, least=1)
    tokens = query, key, value
    output, lse = block_sparse_attention(
        *tokens, *lists, **arguments, return_lse=True, backend="triton"
    )
    expected, expected_lse, _ = reference.block_sparse_attention(
        BlockSparseCall(*tokens, *lists, **arguments)
    )
    error = (output.double() - expected).abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 4e-3), (dtype, error)
    assert (expected_lse == -torch.inf).any()
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


def check_centroids(dtype, with_variance):
    """Block summaries in the same softmax; one sample lists every block of some rows."""
    query, key, value = random_tokens(2, 40, 50, 2, 24, dtype)
    lists = random_lists(2, 2, 2, 4, 4)
    log_count = torch.tensor([2.0, 1.0, 0.0, -torch.inf]) + torch.tensor([0.0, -1.0])[:, None]
    log_count = log_count.expand(2, 2, 4)
    lists[0][0, 1, 0] = torch.arange(4)
    lists[1][0, :, 0] = torch.tensor([0, 4])  # summaries alone, and tokens alone
    drawn = (
        random_tokens(2, 1, 4, 2, 24, dtype, seed=2)[1:]
        + random_tokens(2, 4, 1, 2, 24, dtype, seed=3)[:1]
    )
    centroid_key, centroid_value, spread = (x.float().transpose(1, 2) for x in drawn)
    variance = spread.square().to(dtype).float() if with_variance else None
    arguments = dict(
        block_q=32,
        block_k=16,
        centroids=Centroids(centroid_key, centroid_value, log_count, variance),
    )
    output, lse, tail = block_sparse_attention(
        query, key, value, *lists, **arguments, return_lse=True, return_tail=True, backend="triton"
    )
    expected, expected_lse, expected_tail = reference.block_sparse_attention(
        BlockSparseCall(query, key, value, *lists, **arguments)
    )
    error = (output.double() - expected).abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 4e-3), (dtype, error)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(tail.double(), expected_tail, atol=tolerance, rtol=tolerance)
    assert (tail[0, :32, 0] == 1).all() and (tail[0, :32, 1] == 0).all()


def check_drawn_tails():
    """Masks, text and shared lists beside summaries, some of which stand for nothing."""
    done = 0
    for seed in range(400):
        tokens, arguments = block_sparse_problem(seed, torch.float32)
        if "centroids" not in arguments or tokens[0].numel() + tokens[1].numel() > 40_000:
            continue
        centroids = arguments["centroids"]
        centroids.log_count[:1, :, ::2] = -torch.inf
        output, lse, tail = block_sparse_attention(
            *tokens, **arguments, return_lse=True, return_tail=True, backend="triton"
        )
        expected, expected_lse, expected_tail = reference.block_sparse_attention(
            BlockSparseCall(*tokens, **arguments)
        )
        limits = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(output.double(), expected, **limits)
        torch.testing.assert_close(lse.double(), expected_lse, **limits)
        torch.testing.assert_close(tail.double(), expected_tail, atol=2e-6, rtol=0)
        done += 1
        if done == 12:
            return


def check_tails_that_are_not_finite(wrong):
    """A tail is NaN where the output is, and where the CPU has it."""
    lists = random_lists(1, 2, 2, 4, 2, least=1)
    lists[1][0, 0, 1] = 0  # a row of summaries alone
    drawn = torch.randn(3, 1, 2, 4, 24, generator=torch.Generator().manual_seed(0))
    for part, place in (("query", (0, 3)), ("query", (0, 35)), ("query", (0, 35, 0, 5)),
                        ("key", (0, 20)), ("summary", (0, 0, 2))):  # fmt: skip
        tokens = dict(zip(("query", "key", "value"), random_tokens(1, 40, 50, 2, 24), strict=True))
        centroids = Centroids(drawn[0].clone(), drawn[1], torch.zeros(1, 2, 4), None)
        (centroids.key if part == "summary" else tokens[part])[place] = wrong
        output, tail = block_sparse_attention(
            **tokens, indices=lists[0], counts=lists[1], block_q=32, block_k=16,
            centroids=centroids, return_tail=True, backend="triton",
        )  # fmt: skip
        expected, expected_tail = block_sparse_attention(
            **tokens, indices=lists[0], counts=lists[1], block_q=32, block_k=16,
            centroids=centroids, return_tail=True,
        )  # fmt: skip
        assert expected_tail.isnan().any()
        assert torch.equal(tail.isnan(), expected_tail.isnan()), (part, place, wrong)
        assert torch.equal(output.isnan(), expected.isnan()), (part, place, wrong)


def check_negative_infinity_alone():
    """A query that gives every summary a score of -inf, without any token: NaN, not zeros."""
    query, key, value = random_tokens(1, 16, 16, 1, 16)
    query[0, 3, 0] = 0.0
    query[0, 3, 0, 0] = torch.inf
    centroids = Centroids(-torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1))
    lists = torch.zeros(1, 1, 1, 1).int(), torch.zeros(1, 1, 1).int()
    sizes = {"block_q": 16, "block_k": 16, "centroids": centroids, "return_tail": True}
    for backend in ("cpu", "triton"):
        found = block_sparse_attention(query, key, value, *lists, **sizes, backend=backend)
        assert all(x[0, 3].isnan().all() and x[0, :3].isfinite().all() for x in found), backend


def check_non_finite_tokens(dtype, wrong):
    """NaN and infinity come out as NaN, where the CPU has it too; never as zeros."""
    lists = random_lists(1, 2, 2, 4, 2, least=1)
    lists[1][0, 0, 1] = 0  # a row without any key, which gives zeros
    blocks = {"block_q": 32, "block_k": 16}
    for part, token in (("query", 3), ("query", 35), ("key", 20), ("value", 20)):
        tokens = dict(
            zip(("query", "key", "value"), random_tokens(1, 40, 50, 2, 24, dtype), strict=True)
        )
        tokens[part][0, token] = wrong
        output, lse = block_sparse_attention(
            **tokens, indices=lists[0], counts=lists[1], **blocks, return_lse=True,
            backend="triton",
        )  # fmt: skip
        expected, expected_lse = block_sparse_attention(
            **tokens, indices=lists[0], counts=lists[1], **blocks, return_lse=True
        )
        if part == "query":
            assert output[0, token, 1].isnan().all()
        if part != "value":
            assert torch.equal(lse.isnan(), expected_lse.isnan()), (part, wrong)
            assert torch.equal(output.isnan(), expected.isnan()), (part, wrong)
        else:
            assert torch.equal(output.isfinite(), expected.isfinite()), (part, wrong)
        assert (output[0, 32:, 0] == 0).all()


def check_junk_lists_stay_inside():
    """Behind the checks, as on CUDA: indices and counts that nobody checked are clamped."""
    tokens = random_tokens(1, 16, 40, 1, 16)
    junk = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32).view(1, 1, 1, 2)
    count = torch.full((1, 1, 1), 2**31 - 1, dtype=torch.int32)
    output, _, _ = block_sparse_triton(BlockSparseCall(*tokens, junk, count, 16, 16))
    clamped = torch.tensor([0, 2], dtype=torch.int32).view(1, 1, 1, 2)
    two = torch.full_like(count, 2)
    expected, _, _ = block_sparse_triton(BlockSparseCall(*tokens, clamped, two, 16, 16))
    assert torch.equal(output, expected)


def check_descriptors(dim):
    """Tiles that come through descriptors, out of a fused projection, with ragged tails."""
    fused = random_tokens(2, 70, 70, 6, dim, torch.float16)[1]
    key, value = fused[:, :, :2], fused[:, :, 3:5]
    query = random_tokens(2, 40, 1, 2, dim, torch.float16)[0]
    lists = random_lists(2, 2, 2, 3, 3)
    plain, descriptors = tile_configs(32, 32, dim, 2, (9, 0))
    assert descriptors.tma and not plain.tma
    call = BlockSparseCall(query, key, value, *lists, 32, 32, scale=0.25, return_lse=True)
    expected = block_sparse_triton(call, plain)
    found = block_sparse_triton(call, descriptors)
    assert all(map(torch.equal, found, expected)), dim


if __name__ == "__main__":
    for dtype in (torch.float32, torch.float16):
        check_lists(dtype, 63, 80, 64, 32, 32)
        check_lists(dtype, 40, 50, 40, 20, 25)
        check_everything_at_once(dtype)
        check_centroids(dtype, with_variance=False)
        check_centroids(dtype, with_variance=True)
    check_lists(torch.float32, 130, 150, 72, 128, 64)
    check_lists(torch.float32, 33, 48, 256, 16, 16)
    warnings.simplefilter("ignore")  # numpy, which interprets, warns of NaN
    for wrong in (torch.nan, torch.inf, -torch.inf):
        check_non_finite_tokens(torch.float32, wrong)
        check_tails_that_are_not_finite(wrong)
    check_negative_infinity_alone()
    check_drawn_tails()
    check_junk_lists_stay_inside()
    check_descriptors(64)
    check_descriptors(32)
