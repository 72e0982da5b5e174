"""What NeighborhoodAttn computes on whole sequences: windows, text, limits, padding."""

import pytest
import torch

from diffaccel import FullAttn, NeighborhoodAttn, TokenLayout
from diffaccel.kernels import dense_attention, reference
from diffaccel.layout import Segment

LAYOUTS = {
    "9x14+6": (TokenLayout.image(9, 14, text_after=6), NeighborhoodAttn(5)),
    "7+16x11": (TokenLayout.image(16, 11, text_before=7), NeighborhoodAttn((4, 6), stride=2)),
    "2+5x6x7+3": (
        TokenLayout.video(5, 6, 7, text_before=2, text_after=3),
        NeighborhoodAttn((3, 4, 5), stride=(1, 4, 1)),
    ),
    "4x8x9, all frames": (TokenLayout.video(4, 8, 9), NeighborhoodAttn(3, dilation=2)),
}


def drawn(layout, batch=2, heads=2, dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, layout.length, heads, dim
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def visible(layout, method):
    """The mask (N, N) from the definition of each axis."""
    kernel, stride, dilation = method.windows(layout.grid)
    mask = torch.ones(1, 1, dtype=torch.int)
    for axis in zip(layout.grid, kernel, stride, dilation, strict=True):
        mask = torch.kron(mask, reference.neighborhood_mask(*axis).int())
    whole = torch.ones(layout.length, layout.length, dtype=torch.bool)
    whole[layout.visual_slice, layout.visual_slice] = mask.bool()
    return whole


@pytest.mark.parametrize("layout,method", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_dense_attention_under_the_mask(layout, method):
    tokens = drawn(layout)
    mask = visible(layout, method)
    output, density = method.attend_with_density(*tokens, layout)
    expected = reference.attention(*tokens, mask[None, None])[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert density == pytest.approx(mask.float().mean().item())
    assert density < 0.9


@pytest.mark.parametrize("layout,method", LAYOUTS.values(), ids=LAYOUTS)
def test_text_rows_are_dense(layout, method):
    tokens = drawn(layout)
    output, dense = method.attend(*tokens, layout), dense_attention(*tokens)
    for part in layout.exact_slices:
        torch.testing.assert_close(output[:, part], dense[:, part], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel_size", [16, (9, 14), (3, 99, 14)])
def test_window_as_large_as_the_grid_is_dense_bit_for_bit(kernel_size):
    layout = LAYOUTS["9x14+6"][0]
    tokens = drawn(layout)
    output, density = NeighborhoodAttn(kernel_size).attend_with_density(*tokens, layout)
    assert density == 1.0 and torch.equal(output, FullAttn().attend(*tokens, layout))


def test_text_only_sequences_run_dense():
    layout = TokenLayout((Segment("text", 9),))
    tokens = drawn(layout)
    assert torch.equal(NeighborhoodAttn(3).attend(*tokens, layout), dense_attention(*tokens))


def test_padding_equals_single_runs_whatever_the_padded_tokens_hold():
    layout, method = LAYOUTS["2+5x6x7+3"]
    query, key, value = drawn(layout, batch=3)
    is_key = torch.ones(3, layout.length, dtype=torch.bool)
    is_key[0, -2:] = is_key[1, 1:30] = False
    poisoned = [x.masked_fill(~is_key[..., None, None], torch.nan) for x in (key, value)]
    output = method.attend(query, *poisoned, layout, key_padding_mask=is_key)
    mask = visible(layout, method) & is_key[:, None, None]
    expected = reference.attention(query, key, value, mask)[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_schedule_runs_dense():
    layout, _ = LAYOUTS["9x14+6"]
    tokens = drawn(layout)
    method = NeighborhoodAttn(5, dense_steps=1, dense_layers=(2,))
    dense = dense_attention(*tokens)
    assert torch.equal(method.attend(*tokens, layout, layer=0, step=0), dense)
    assert torch.equal(method.attend(*tokens, layout, layer=2, step=1), dense)
    assert not torch.equal(method.attend(*tokens, layout, layer=0, step=1), dense)


def test_constant_values_stay_constant():
    layout, method = LAYOUTS["7+16x11"]
    query, key, value = drawn(layout)
    constant = value[:, :1].expand_as(value)
    output = method.attend(query, key, constant, layout)
    torch.testing.assert_close(output, constant, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"kernel_size": 0}, "kernel_size must be"),
        ({"kernel_size": 3.0}, "kernel_size must be"),
        ({"stride": (1, 1, 1, 1)}, "stride must be"),
        ({"kernel_size": 3, "stride": 4}, "stride must not exceed"),
        ({"kernel_size": (5, 3), "stride": (1, 5, 3, 1)[:2]}, "stride must not exceed"),
        ({"dense_steps": -1}, "dense_steps"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttn(**knobs)
