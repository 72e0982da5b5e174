"""Neighborhood attention on a real GPU: bf16, large grids, what the interpreter cannot show."""

import pytest
import torch

from diffaccel.kernels import neighborhood_attention, reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, which this machine lacks"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dim", [40, 64, 80, 128, 256])
def test_windows_with_text_match_the_oracle(problems, assert_close_to_oracle, dtype, dim):
    grid, axes = (3, 14, 19), [(2, 1, 1, False), (6, 2, 2, False), (9, 4, 1, True)]
    length = torch.Size(grid).numel()
    tokens = problems.random_tokens(2, length, length, 2, dim, dtype, device="cuda")
    tokens = [x.unflatten(1, grid) for x in tokens]
    text = problems.random_tokens(2, 1, 33, 2, dim, dtype, seed=1, device="cuda")[1:]
    names = ("kernel_size", "stride", "dilation", "is_causal")
    arguments = dict(zip(names, map(list, zip(*axes, strict=True)), strict=True))
    output, lse = neighborhood_attention(
        *tokens, **arguments, extra_key=text[0], extra_value=text[1], return_lse=True
    )
    cpu = [x.cpu() for x in (*tokens, *text)]
    expected, expected_lse = reference.neighborhood_attention(
        *cpu[:3], axes, extra_key=cpu[3], extra_value=cpu[4]
    )
    assert_close_to_oracle(output.cpu(), expected)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("stride", [1, 16])
def test_kernel_equals_gathering_at_the_size_of_a_4k_picture(problems, stride):
    tokens = problems.random_tokens(1, 65536, 65536, 2, 64, torch.float32, device="cuda")
    grids = [x.unflatten(1, (256, 256)) for x in tokens]
    outputs = [
        neighborhood_attention(*grids, 80, stride=stride, backend=backend)
        for backend in ("triton", "gather")
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)
