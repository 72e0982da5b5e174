"""Runs the Triton neighborhood kernel under TRITON_INTERPRET=1 and checks it; silent when right.

Runs in its own process: the variable is read when `@triton.jit` runs. bf16 is left out, because
the interpreter computes on its bit patterns.
"""

import warnings

import torch
from kernel_problems import random_tokens

from diffaccel.kernels import neighborhood_attention, reference

CASES = (
    # grid, kernel size, stride, dilation, causal, heads, key heads, head dim, text, and where
    # they are not 0 and False, phase and truncation
    ((37,), (9,), (1,), (1,), (False,), 2, 2, 24, 0),
    ((37,), (8,), (4,), (2,), (True,), 1, 1, 16, 5),
    ((13, 18), (5, 8), (1, 8), (1, 1), (False, False), 2, 1, 40, 7),
    ((16, 32), (8, 16), (8, 16), (1, 1), (False, False), 1, 1, 64, 0),
    ((11, 9), (4, 3), (2, 3), (2, 3), (False, True), 1, 1, 16, 3),
    ((3, 7, 10), (2, 4, 6), (1, 2, 3), (1, 1, 1), (True, False, False), 2, 2, 16, 4),
    ((20, 13), (8, 5), (8, 1), (1, 1), (False, False), 1, 1, 16, 3, (4, 0), (True, True)),
    ((9, 30), (4, 12), (4, 6), (1, 2), (False, False), 1, 1, 16, 0, (3, 5), (False, True)),
    ((1, 1, 5), (1, 1, 5), (1, 1, 1), (1, 1, 1), (False, False, False), 1, 1, 16, 2),
)


def check(case, dtype, seed):
    grid, kernel, stride, dilation, causal, heads, key_heads, dim, text, *shape = case
    phase, truncated = shape or ((0,) * len(grid), (False,) * len(grid))
    length = torch.Size(grid).numel()
    query, key, value = random_tokens(2, length, length, heads, dim, dtype, seed=seed)
    fused = torch.stack([key[:, :, :key_heads], value[:, :, :key_heads]], 2)
    key, value = fused[:, :, 0], fused[:, :, 1]
    query, key, value = (x.unflatten(1, grid) for x in (query, key, value))
    extra, names = {}, ("extra_key", "extra_value")
    mask = None
    if text:
        drawn = random_tokens(2, 1, text, key_heads, dim, dtype, seed=seed + 1)[1:]
        mask = torch.arange(text) < torch.tensor([[text], [text - 2]])
        for tensor in drawn:
            tensor[~mask] = torch.nan
        extra = dict(zip(names, drawn, strict=True))
    output, lse = neighborhood_attention(
        query, key, value, kernel, stride=stride, dilation=dilation, is_causal=causal,
        phase=phase, is_truncated=truncated,
        **extra, extra_padding_mask=mask, return_lse=True, backend="triton",
    )  # fmt: skip
    axes = list(zip(kernel, stride, dilation, causal, phase, truncated, strict=True))
    key, value = (x.repeat_interleave(heads // key_heads, -2) for x in (key, value))
    for sample in range(2):
        one = slice(sample, sample + 1)
        seen = {
            name: x[one, : text - 2 * sample].repeat_interleave(heads // key_heads, 2)
            for name, x in extra.items()
        }
        expected, expected_lse = reference.neighborhood_attention(
            query[one], key[one], value[one], axes, **seen
        )
        error = (output[one].double() - expected).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 4e-3), (case, dtype, error)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(lse[one].double(), expected_lse, atol=tolerance, rtol=1e-3)


def check_non_finite_tokens(dtype, wrong):
    """NaN and infinity come out as NaN, where the CPU has it too; never as zeros."""
    for place in range(3):
        tokens = [x.unflatten(1, (6, 7)) for x in random_tokens(1, 42, 42, 1, 16, dtype)]
        tokens[place][0, 2, 3] = wrong
        output, lse = neighborhood_attention(*tokens, 3, return_lse=True, backend="triton")
        expected, expected_lse = neighborhood_attention(*tokens, 3, return_lse=True)
        assert torch.equal(lse.isnan(), expected_lse.isnan()), (place, wrong)
        assert torch.equal(output.isfinite(), expected.isfinite()), (place, wrong)
        assert not output[0, 2, 3].isfinite().any()


if __name__ == "__main__":
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for number, case in enumerate(CASES):
        for dtype in (torch.float32, torch.float16):
            check(case, dtype, number)
    warnings.simplefilter("ignore")  # numpy, which interprets, warns of NaN
    for wrong in (torch.nan, torch.inf, -torch.inf):
        check_non_finite_tokens(torch.float32, wrong)
