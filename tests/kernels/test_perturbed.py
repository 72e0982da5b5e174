"""Map-free forms of damaged attention against explicit maps in fp64."""

import math

import pytest
import torch

from diffaccel.kernels import dense_attention
from diffaccel.kernels.perturbed import (
    blurred_queries,
    image_mass_to_self_attention,
    mean_query_attention,
    self_and_text_attention,
    uniform_attention,
)
from diffaccel.kernels.reference.perturbed import (
    apply_map,
    attention_map,
    blurred_grid,
    image_mass_on_diagonal,
    isolated_image_map,
    uniform_map,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def drawn(batch=2, length=35, heads=3, dim=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, length, heads, dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).unbind(0)


def padded(length=35, batch=2):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, -4:] = False
    return mask


@pytest.mark.parametrize("mask", [None, padded()], ids=["all", "padded"])
def test_uniform_is_the_mean_of_valid_values(mask):
    query, key, value = drawn()
    weights = uniform_map(attention_map(query, key), mask)
    got = uniform_attention(value, mask).expand_as(value)
    torch.testing.assert_close(got, apply_map(weights, value), **EXACT)


@pytest.mark.parametrize("mask", [None, padded()], ids=["all", "padded"])
def test_mean_query_is_one_row_of_the_map(mask):
    query, key, value = drawn()
    weights = attention_map(query.mean(1, keepdim=True), key, 0.3, mask)
    got = mean_query_attention(query, key, value, scale=0.3, key_padding_mask=mask)
    torch.testing.assert_close(got, apply_map(weights, value), **EXACT)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("grid", [(1, 5, 7), (2, 3, 4), (1, 1, 9)])
def test_blurred_queries_are_gaussian_means(grid, sigma):
    query = drawn(length=math.prod(grid))[0]
    expected = blurred_grid(query, grid, sigma)
    torch.testing.assert_close(blurred_queries(query, grid, sigma), expected, **EXACT)


def test_blur_has_its_limits():
    query = drawn(length=35)[0].float()
    grid = (1, 5, 7)
    mean = query.mean(1, keepdim=True).expand_as(query)
    torch.testing.assert_close(blurred_queries(query, grid, math.inf), mean)
    torch.testing.assert_close(blurred_queries(query, grid, 1e-3), query)
    assert (blurred_queries(query, grid, 1.0) - mean).abs().max() > 0.1
    constant = torch.ones_like(query)
    torch.testing.assert_close(blurred_queries(constant, grid, 1.5), constant)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text", [1, 6])
def test_image_tokens_that_see_themselves_and_text(text_first, text):
    query, key, value = drawn(length=29 + text)
    is_image = torch.ones(29 + text, dtype=torch.bool)
    is_image[slice(0, text) if text_first else slice(29, None)] = False
    weights = isolated_image_map(query, key, is_image, 0.2)
    got = self_and_text_attention(
        query[:, is_image],
        key[:, is_image],
        value[:, is_image],
        key[:, ~is_image],
        value[:, ~is_image],
        scale=0.2,
    )
    torch.testing.assert_close(got, apply_map(weights, value)[:, is_image], **EXACT)


def test_image_tokens_without_text_see_themselves():
    query, key, value = drawn()
    none = key[:, :0]
    assert torch.equal(self_and_text_attention(query, key, value, none, none), value)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("mask", [None, padded()], ids=["all", "padded"])
def test_image_mass_moves_to_the_diagonal(text_first, mask):
    query, key, value = drawn()
    is_image = torch.ones(35, dtype=torch.bool)
    is_image[slice(0, 6) if text_first else slice(29, None)] = False
    rows = slice(6, 35) if text_first else slice(0, 29)
    weights = image_mass_on_diagonal(attention_map(query, key, 0.2, mask), is_image)
    got = image_mass_to_self_attention(
        query, key, value, is_image, rows, scale=0.2, key_padding_mask=mask
    )
    # A padded image token keeps what it pays to others on itself; nobody reads its row.
    valid = torch.ones(2, 35, dtype=torch.bool) if mask is None else mask
    expected = apply_map(weights, value)[:, is_image]
    torch.testing.assert_close(got[valid[:, is_image]], expected[valid[:, is_image]], **EXACT)


def test_mixtures_of_outputs_are_mixtures_of_maps():
    query, key, value = drawn()
    weights = attention_map(query, key)
    for strength in (0.25, 1.0):
        mixed = (1 - strength) * weights + strength * torch.eye(35, dtype=torch.float64)
        output = dense_attention(query, key, value).lerp(value, strength)
        torch.testing.assert_close(output, apply_map(mixed, value), **EXACT)
