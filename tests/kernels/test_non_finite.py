"""What is not finite stays visible: NaN and infinity never come out of a kernel as zeros."""

from __future__ import annotations

import pytest
import torch

from diffaccel import (
    AgentAttn,
    FullAttn,
    HierarchicalWindowAttn,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
    SparseAttn,
    TokenLayout,
    TokenMergingAttn,
)
from diffaccel.kernels import merge_attention, select_blocks

LAYOUT = TokenLayout.image(16, 12, text_after=6)
N = LAYOUT.length
BLOCKS = [
    SparseAttn(0.25, block=16),
    SparseAttn(0.25, block=16, p_remain=0.5, neighbors=True),
    SparseAttn(0.25, block=16, selector="pooled", corrector="none"),
    RectifiedSpaAttn(0.8, block=16),
    RectifiedSpaAttn(0.8, block=16, gapr=False),
    RectifiedSpaAttn(0.8, block=16, correction="centroids"),
]
WINDOWS = [NeighborhoodAttn(5), SlidingWindowAttn(5), HierarchicalWindowAttn(5)]
GROUPS = [
    *(AgentAttn(least_tokens=0, agents=kind) for kind in ("pool", "middle", "match")),
    TokenMergingAttn(0.5, least_tokens=0),
]
METHODS = [*BLOCKS, *WINDOWS, *GROUPS]
WRONG = [torch.nan, torch.inf, -torch.inf]
MASKS = [False, True]
BAD = 37


def tokens_of(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, N, 2, 16)
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 100:130] = mask[1, -2:] = False
    return query, key, value, mask


def names(methods):
    return pytest.mark.parametrize("method", methods, ids=repr)


@names(METHODS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("is_masked", MASKS)
def test_a_query_that_is_not_finite_gives_nan(method, wrong, is_masked):
    query, key, value, mask = tokens_of()
    mask = mask if is_masked else None
    sound = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    query[0, BAD, 0] = wrong
    output = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    assert output[0, BAD, 0].isnan().all()
    assert torch.equal(output[1], sound[1])
    if not isinstance(method, AgentAttn | TokenMergingAttn):  # which mix queries
        rest = output.clone()
        rest[0, BAD, 0] = 0.0
        assert rest.isfinite().all()


@names(METHODS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("is_masked", MASKS)
def test_a_key_that_is_not_finite_poisons_what_attends_it(method, wrong, is_masked):
    query, key, value, mask = tokens_of()
    mask = mask if is_masked else None
    sound = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    key[0, BAD, 0] = wrong
    output = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    assert output[0, BAD, 0].isnan().all()
    assert torch.equal(output[1], sound[1])
    assert (output[0, :, 1] != 0).all()
    if method in BLOCKS:  # the block of the key is computed by every row, as in dense attention
        dense = FullAttn().attend(query, key, value, LAYOUT, key_padding_mask=mask)
        assert torch.equal(output[0, :, 0].isnan(), dense[0, :, 0].isnan())


@names(BLOCKS)
def test_the_density_counts_the_blocks_that_are_not_finite(method):
    query, key, value, _ = tokens_of()
    query[:] = torch.nan
    output, density = method.attend_with_density(query, key, value, LAYOUT)
    assert output.isnan().all() and float(density) > 0.1
    query, key, value, _ = tokens_of()
    key[:] = torch.nan
    output, density = method.attend_with_density(query, key, value, LAYOUT)
    assert output.isnan().all() and float(density) > 0.1


@names(METHODS)
def test_padding_that_is_not_finite_stays_outside(method):
    query, key, value, mask = tokens_of()
    sound = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    for tokens in (query, key, value):
        tokens[~mask] = torch.nan
    output = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    assert torch.equal(output[mask], sound[mask])


@names([*BLOCKS, *WINDOWS])
def test_a_sample_without_any_key_gives_zeros(method):
    query, key, value, mask = tokens_of()
    mask[1] = False
    visual = LAYOUT.visual_slice
    output = method.attend(query, key, value, LAYOUT, key_padding_mask=mask)
    assert (output[1, visual] == 0).all() and (output[0] != 0).all()


@names(METHODS)
def test_fp64_is_computed_in_fp64(method):
    """Two runs of fp64 whose values differ by less than fp32 resolves, and their difference."""
    query, key, value, _ = tokens_of(dtype=torch.float64)
    output = method.attend(query, key, value, LAYOUT)
    assert output.dtype == torch.float64
    step = 1e-11 * torch.randn(value.shape, dtype=torch.float64)
    moved = method.attend(query, key, value + step, LAYOUT) - output
    expected = method.attend(query, key, 1e11 * step, LAYOUT) * 1e-11
    estimates = getattr(method, "corrector", "none") != "none"
    if not estimates and not isinstance(method, RectifiedSpaAttn | HierarchicalWindowAttn):
        # those estimate or merge with fp32 numbers
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-14)
    narrow = method.attend(query.float(), key.float(), value.float(), LAYOUT)
    torch.testing.assert_close(output.float(), narrow, rtol=1e-4, atol=1e-4)


def test_nan_is_the_largest_score():
    scores = torch.tensor([[[[0.1, 0.2, torch.nan, 0.4], [torch.nan] * 4, [0.4, 0.3, 0.0, 0.0]]]])
    for p_remain in (0.0, 0.3):
        indices, counts = select_blocks(scores, 2, p_remain=p_remain)
        assert counts.tolist() == [[[2, 2, 2]]]
        assert indices[..., :2].tolist() == [[[[2, 3], [0, 1], [0, 1]]]]


def test_merging_hides_no_nan():
    outputs = [torch.ones(1, 3, 1, 2), torch.full((1, 3, 1, 2), torch.nan)]
    lses = [torch.zeros(1, 3, 1), torch.tensor([-torch.inf, -300.0, torch.nan]).view(1, 3, 1)]
    merged, lse = merge_attention(outputs, lses)
    assert (merged[0, 0] == 1).all() and merged[0, 1:].isnan().all()
    assert lse[0, 0, 0] == 0 and lse[0, 2, 0].isnan()
