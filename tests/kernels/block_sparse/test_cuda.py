"""The Triton kernel on a real GPU, bf16 included."""

import pytest
import torch

from diffaccel.kernels import BlockSparseCall, Centroids, block_sparse_attention, reference

pytest.importorskip("triton", reason="triton is not installed on this platform")
from diffaccel.kernels.block_sparse.launch import block_sparse_triton  # noqa: E402
from diffaccel.kernels.block_sparse.tiles import device_capability, tile_configs  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dim", [40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("length", [63, 1000])
def test_random_lists_match_the_oracle(problems, assert_close_to_oracle, length, dim, dtype):
    tokens = problems.random_tokens(2, length, length, 2, dim, dtype, device="cuda")
    blocks = -(-length // 128)
    lists = problems.random_lists(2, 2, blocks, blocks, min(4, blocks), device="cuda")
    sizes = {"block_q": 128, "block_k": 128}
    output, lse = block_sparse_attention(*tokens, *lists, **sizes, return_lse=True)
    expected, expected_lse, _ = reference.block_sparse_attention(
        BlockSparseCall(*tokens, *lists, **sizes)
    )
    mask = reference.block_mask(*lists, **sizes, queries=length, keys=length)
    assert_close_to_oracle(output, expected, problems.masked_sdpa(*tokens, mask))
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_masks_text_and_epilogue_match_the_oracle(problems, assert_close_to_oracle, dtype):
    query, key, value = problems.random_tokens(3, 300, 300, 2, 64, dtype, device="cuda")
    _, *text = problems.random_tokens(3, 1, 77, 2, 64, dtype, seed=1, device="cuda")
    is_key = torch.arange(300, device="cuda") < torch.tensor([[300], [150], [0]], device="cuda")
    key[~is_key], value[~is_key] = torch.nan, torch.nan
    arguments = dict(
        block_q=64,
        block_k=64,
        key_padding_mask=is_key,
        extra_key=text[0],
        extra_value=text[1],
        row_scale=torch.rand(3, 2, 5, device="cuda"),
        row_bias=torch.randn(3, 2, 5, 64, device="cuda"),
    )
    lists = problems.random_lists(3, 2, 5, 5, 4, device="cuda")
    output = block_sparse_attention(query, key, value, *lists, **arguments)
    expected, _, _ = reference.block_sparse_attention(
        BlockSparseCall(query, key, value, *lists, **arguments)
    )
    assert_close_to_oracle(output, expected)


@pytest.mark.parametrize("with_variance", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_centroids_match_the_oracle(problems, assert_close_to_oracle, dtype, with_variance):
    tokens = problems.random_tokens(3, 300, 300, 2, 64, dtype, device="cuda")
    # the summaries are rounded to the dtype of the query, so they are drawn in it
    drawn = torch.randn(3, 3, 2, 5, 64, device="cuda").to(dtype)
    variance = drawn[2].square().float() if with_variance else None
    log_count = torch.tensor([4.0, 3.0, 2.0, 1.0, -torch.inf], device="cuda").repeat(3, 1)
    arguments = dict(
        block_q=64,
        block_k=64,
        centroids=Centroids(drawn[0].float(), drawn[1].float(), log_count, variance),
    )
    lists = problems.random_lists(3, 2, 5, 5, 5, device="cuda")
    output = block_sparse_attention(*tokens, *lists, **arguments)
    expected, _, _ = reference.block_sparse_attention(
        BlockSparseCall(*tokens, *lists, **arguments)
    )
    assert_close_to_oracle(output, expected)


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
def test_every_way_to_load_gives_the_same(problems, dim):
    fused = problems.random_tokens(2, 1000, 1000, 6, dim, torch.bfloat16, device="cuda")[1]
    tokens = fused[:, :, :2], fused[:, :, 2:4], fused[:, :, 4:]
    lists = problems.random_lists(2, 2, 8, 8, 8, device="cuda")
    call = BlockSparseCall(*tokens, *lists, 128, 128, scale=0.1, return_lse=True)
    configs = tile_configs(128, 128, dim, 2, device_capability(fused.device))
    if len(configs) == 1:
        pytest.skip("this GPU has no copy engine for tiles")
    results = [block_sparse_triton(call, config) for config in configs]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_unchecked_lists_never_read_outside(problems):
    tokens = problems.random_tokens(1, 128, 300, 1, 64, device="cuda")
    junk = torch.tensor([[[[-5, 2**31 - 1]]]], dtype=torch.int32, device="cuda")
    count = torch.full((1, 1, 1), 99, dtype=torch.int32, device="cuda")
    output = block_sparse_attention(*tokens, junk, count, block_q=128, block_k=128)
    assert torch.isfinite(output).all()
