"""HierarchicalWindowAttn: windows of the picture and of smaller ones, against their mask."""

import pytest
import torch

from diffaccel import HierarchicalWindowAttn, NeighborhoodAttn, TokenLayout
from diffaccel.kernels import dense_attention, reference
from diffaccel.layout import Segment

LAYOUT = TokenLayout(
    (
        Segment("text", 5),
        Segment("visual", 96, (1, 8, 12)),
        Segment("condition", 24, (1, 4, 6)),
        Segment("condition", 3),
        Segment("condition", 10, (1, 2, 5)),  # does not divide the picture: attended exactly
    )
)
METHOD = HierarchicalWindowAttn(3, (3, 2))


def drawn(layout=LAYOUT, batch=2):
    generator = torch.Generator().manual_seed(0)
    shape = batch, layout.length, 2, 24
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def visible():
    """The mask (N, N), cell by cell."""
    mask = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    near = [reference.neighborhood_mask(length, 3) for length in (8, 12)]
    coarse = [reference.neighborhood_mask(4, 3), reference.neighborhood_mask(6, 2)]
    for y in range(8):
        for x in range(12):
            query = 5 + y * 12 + x
            fine = near[0][y][:, None] & near[1][x][None]
            mask[query, 5:101] = fine.flatten()
            seen = coarse[0][y // 2][:, None] & coarse[1][x // 2][None]
            mask[query, 101:125] = seen.flatten()
    return mask


def test_equals_dense_attention_under_the_mask():
    tokens, mask = drawn(), visible()
    output, density = METHOD.attend_with_density(*tokens, LAYOUT)
    expected = reference.attention(*tokens, mask[None, None])[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert density == pytest.approx(mask.float().mean().item())


def test_padding_has_no_influence():
    query, key, value = drawn()
    is_key = torch.ones(2, LAYOUT.length, dtype=torch.bool)
    is_key[0, 2:5] = is_key[1, 110:130] = is_key[1, 20:40] = False
    poisoned = [x.masked_fill(~is_key[..., None, None], torch.nan) for x in (key, value)]
    output = METHOD.attend(query, *poisoned, LAYOUT, key_padding_mask=is_key)
    mask = visible() & is_key[:, None, None]
    expected = reference.attention(query, key, value, mask)[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_without_a_smaller_picture_it_is_neighborhood_attention():
    layout = TokenLayout.image(8, 12, text_before=5)
    tokens = drawn(layout)
    expected = NeighborhoodAttn(3).attend(*tokens, layout)
    assert torch.equal(METHOD.attend(*tokens, layout), expected)


def test_windows_as_large_as_the_grids_are_dense():
    tokens = drawn()
    whole = HierarchicalWindowAttn((8, 11), 99).attend(*tokens, LAYOUT)
    near = torch.ones(8, 8, dtype=torch.int), reference.neighborhood_mask(12, 11).int()
    mask = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    mask[5:101, 5:101] = torch.kron(*near).bool()
    expected = reference.attention(*tokens, mask[None, None])[0]
    torch.testing.assert_close(whole.double(), expected, atol=1e-5, rtol=1e-5)
    everything = HierarchicalWindowAttn(99, 99).attend(*tokens, LAYOUT)
    torch.testing.assert_close(everything, dense_attention(*tokens))


def test_constant_values_stay_constant():
    query, key, value = drawn()
    constant = value[:, :1].expand_as(value)
    output = METHOD.attend(query, key, constant, LAYOUT)
    torch.testing.assert_close(output, constant, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("knobs", [{"window": 0}, {"coarse_window": (1, 2, 3, 4)}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(ValueError, match="window must be"):
        HierarchicalWindowAttn(**knobs)
