"""Neighborhood attention against its definition: drawn windows, borders, text, limits."""

import dataclasses
import random

import pytest
import torch

from diffaccel.kernels import dense_attention, neighborhood_attention, reference
from diffaccel.kernels.neighborhood.windows import Axis, axis_tiles, window

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


def drawn_axis(rng, longest):
    """Draws what `Axis` takes; the border cases often."""
    length = rng.randint(1, longest)
    dilation = rng.choice((1, 1, 1, rng.randint(1, max(1, length // 2))))
    most = length // dilation
    kernel = rng.choice((most, rng.randint(1, most), rng.randint(1, most)))
    is_causal, is_truncated = rng.choice(
        ((True, False), (False, False), (False, False), (False, True))
    )
    if is_truncated:
        kernel = rng.randint(1, 2 * length)
    stride = rng.choice((1, kernel, rng.randint(1, kernel)))
    phase = rng.choice((0, 0, stride // 2, rng.randrange(stride)))
    return length, kernel, stride, dilation, is_causal, phase, is_truncated


@pytest.mark.drawn(40)
def test_windows_equal_the_definition(seed):
    """Every query of 50 drawn axes: 2,000 axes in all."""
    rng = random.Random(seed)
    for _ in range(50):
        axis = Axis(*drawn_axis(rng, 29))
        length, kernel, dilation = axis.length, axis.kernel, axis.dilation
        mask = reference.neighborhood_mask(*dataclasses.astuple(axis))
        found = torch.zeros_like(mask)
        for group in range(dilation):
            size = axis.group_length(group)
            for place in range(size):
                first, last = window(place, size, axis)
                found[group + place * dilation, group:length:dilation][first:last] = True
        assert torch.equal(found, mask), axis
        if not axis.is_causal and not axis.is_truncated:
            assert (mask.sum(1) == kernel).all(), axis
        assert mask.diagonal().all(), axis


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_tiles_hold_every_query_once_with_its_own_window(size):
    rng = random.Random(size)
    for _ in range(100):
        axis = Axis(*drawn_axis(rng, 40))
        for group in range(axis.dilation):
            length, seen = axis.group_length(group), []
            for tiles in axis_tiles(axis, group, size):
                for start, box in zip(tiles.starts, tiles.box_starts, strict=True):
                    assert 0 <= box and box + tiles.box <= length
                    for i, (first, last) in enumerate(tiles.windows):
                        assert (box + first, box + last) == window(start + i, length, axis)
                        seen.append(start + i)
            assert sorted(seen) == list(range(length))


@pytest.mark.drawn(300)
def test_drawn_cases_match_the_oracle(problems, assert_close_to_oracle, poisoned_empty, seed):
    """Grids of 1 to 3 axes, drawn windows, dtypes, heads, text."""
    rng = random.Random(1000 + seed)
    rank = rng.randint(1, 3)
    drawn = [drawn_axis(rng, (50, 13, 7)[rank - 1]) for _ in range(rank)]
    grid, windows = [axis[0] for axis in drawn], [axis[1:] for axis in drawn]
    batch, heads, dim = rng.randint(1, 3), rng.randint(1, 3), rng.choice((16, 24, 40))
    length = torch.Size(grid).numel()
    dtype = rng.choice(DTYPES)
    tokens = problems.random_tokens(batch, length, length, heads, dim, dtype, seed=seed)
    tokens = [x.unflatten(1, grid) for x in tokens]
    text = {}
    if rng.random() < 0.5:
        _, text_key, text_value = problems.random_tokens(batch, 1, 7, heads, dim, dtype)
        text = {"extra_key": text_key, "extra_value": text_value}
    names = ("kernel_size", "stride", "dilation", "is_causal", "phase", "is_truncated")
    arguments = dict(zip(names, map(list, zip(*windows, strict=True)), strict=True))
    output, lse = neighborhood_attention(*tokens, **arguments, **text, return_lse=True)
    expected, expected_lse = reference.neighborhood_attention(*tokens, windows, **text)
    assert output.dtype == dtype and output.shape == tokens[0].shape
    assert_close_to_oracle(output, expected)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)
    alone = neighborhood_attention(*tokens, **arguments, **text)  # may take the dense way
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(alone, output, atol=tolerance, rtol=tolerance)


def test_error_rule_against_sdpa_with_the_same_mask(problems, assert_close_to_oracle):
    tokens = problems.random_tokens(1, 20 * 26, 20 * 26, 2, 64)
    mask = torch.kron(
        reference.neighborhood_mask(20, 8, 4).int(), reference.neighborhood_mask(26, 7).int()
    ).bool()
    expected = reference.attention(*tokens, mask[None, None])[0]
    twin = problems.masked_sdpa(*tokens, mask.expand(1, 2, -1, -1))
    grids = [x.unflatten(1, (20, 26)) for x in tokens]
    output = neighborhood_attention(*grids, (8, 7), stride=(4, 1))
    assert_close_to_oracle(output.flatten(1, 2), expected, twin)


def test_window_as_large_as_the_grid_is_dense_bit_for_bit(problems):
    tokens = problems.random_tokens(2, 91, 91, 2, 32)
    grids = [x.unflatten(1, (7, 13)) for x in tokens]
    output = neighborhood_attention(*grids, (7, 13), stride=(3, 13))
    assert torch.equal(output.flatten(1, 2), dense_attention(*tokens))


def test_stride_as_large_as_the_window_is_blocked_attention(problems):
    tokens = problems.random_tokens(1, 96, 96, 2, 32)
    grids = [x.unflatten(1, (8, 12)) for x in tokens]
    output = neighborhood_attention(*grids, 4, stride=4)
    blocks = [
        x.unflatten(2, (3, 4)).unflatten(1, (2, 4)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        for x in grids
    ]
    expected = dense_attention(*blocks)
    expected = expected.view(1, 2, 3, 4, 4, 2, 32).transpose(2, 3).reshape(output.shape)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_phase_and_truncation_shift_blocked_windows_as_swin_does(problems):
    """Shifted by half a window: the border windows are shorter, all others whole."""
    tokens = problems.random_tokens(1, 20, 20, 2, 32)
    output = neighborhood_attention(*tokens, 8, stride=8, phase=4, is_truncated=True)
    for start, stop in ((0, 4), (4, 12), (12, 20)):
        expected = dense_attention(*(x[:, start:stop] for x in tokens))
        torch.testing.assert_close(output[:, start:stop], expected, atol=1e-6, rtol=1e-5)


def test_dilation_is_independent_attention_on_every_second_token(problems):
    tokens = problems.random_tokens(1, 31, 31, 1, 32)
    output = neighborhood_attention(*tokens, 5, dilation=2)
    for group in range(2):
        own = [x[:, group::2] for x in tokens]
        torch.testing.assert_close(
            output[:, group::2], neighborhood_attention(*own, 5), atol=1e-6, rtol=1e-5
        )


def test_grouped_heads_equal_repeated_heads(problems):
    query, key, value = problems.random_tokens(2, 40, 40, 6, 16)
    key, value = key[:, :, :2], value[:, :, :2]
    grouped = neighborhood_attention(query, key, value, 9)
    repeated = [x.repeat_interleave(3, 2) for x in (key, value)]
    assert torch.equal(grouped, neighborhood_attention(query, *repeated, 9))


def test_value_may_have_another_head_dim(problems):
    query, key, value = problems.random_tokens(1, 40, 40, 2, 16)
    wide = torch.cat([value, value], -1)
    output = neighborhood_attention(query, key, wide, 40)
    expected, _ = reference.attention(query, key, wide)
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=1e-5)


def test_zero_scale_gives_the_mean_of_the_window(problems):
    query, key, value = problems.random_tokens(1, 20, 20, 1, 16)
    output = neighborhood_attention(query, key, value, 5, scale=0.0)
    torch.testing.assert_close(output[:, 10], value[:, 8:13].mean(1), atol=1e-6, rtol=1e-5)


def test_padded_text_of_any_length_has_no_influence(problems):
    query, key, value = problems.random_tokens(3, 48, 48, 2, 16)
    grids = [x.unflatten(1, (6, 8)) for x in (query, key, value)]
    _, text_key, text_value = problems.random_tokens(3, 1, 9, 2, 16, seed=1)
    is_text = torch.arange(9) < torch.tensor([[9], [4], [0]])
    text_key[~is_text], text_value[~is_text] = torch.nan, torch.nan
    output, lse = neighborhood_attention(
        *grids, 3, extra_key=text_key, extra_value=text_value, extra_padding_mask=is_text,
        return_lse=True,
    )  # fmt: skip
    for sample, count in enumerate((9, 4, 0)):
        one = slice(sample, sample + 1)
        expected, expected_lse = reference.neighborhood_attention(
            *(x[one] for x in grids), [(3, 1, 1, False)] * 2,
            extra_key=text_key[one, :count], extra_value=text_value[one, :count],
        )  # fmt: skip
        torch.testing.assert_close(output[one].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[one].double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_padded_keys_have_no_influence_and_a_window_of_padding_gives_zero(problems):
    query, key, value = problems.random_tokens(2, 40, 40, 2, 16)
    is_key = torch.ones(2, 40, dtype=torch.bool)
    is_key[0, 10:25] = False
    poisoned = [x.masked_fill(~is_key[..., None, None], torch.nan) for x in (key, value)]
    output, lse = neighborhood_attention(
        query, *poisoned, 5, key_padding_mask=is_key, return_lse=True
    )
    mask = reference.neighborhood_mask(40, 5) & is_key[:, None, None]
    expected, expected_lse = reference.attention(query, key, value, mask)
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert (lse == -torch.inf).sum() == 2 * 11


def test_views_of_a_fused_projection_and_untouched_inputs(problems):
    tokens = problems.random_tokens(2, 35, 35, 3, 16)
    fused = torch.cat([x.flatten(2) for x in tokens], 2)
    views = [x.unflatten(2, (3, 16)).unflatten(1, (5, 7)) for x in fused.chunk(3, 2)]
    before = fused.clone()
    output = neighborhood_attention(*views, (3, 5))
    assert torch.equal(output, neighborhood_attention(*(x.contiguous() for x in views), (3, 5)))
    assert torch.equal(fused, before)


GRID = torch.zeros(1, 6, 8, 2, 16)
BAD = {
    "rank": ({"query": GRID[0, 0]}, ValueError, r"must be \(B, X, H, D\)"),
    "grids": ({"key": GRID[:, :5], "value": GRID[:, :5]}, ValueError, "share batch and grid"),
    "heads": ({"query": GRID[:, :, :, :1]}, ValueError, "multiple"),
    "dtype": ({"key": GRID.half()}, TypeError, "one dtype"),
    "device": ({"key": GRID.to("meta")}, ValueError, "one device"),
    "kernel": ({"kernel_size": 7}, ValueError, "at most 6"),
    "kernel and dilation": ({"dilation": 3}, ValueError, "at most 2"),
    "stride": ({"stride": (4, 1)}, ValueError, "must not exceed kernel_size"),
    "axes": ({"kernel_size": (3, 3, 3)}, ValueError, "one per grid axis"),
    "float": ({"kernel_size": 3.0}, ValueError, "kernel_size must be one int"),
    "zero": ({"stride": 0}, ValueError, "at least 1"),
    "phase": ({"stride": 2, "phase": (1, 2)}, ValueError, "phase must be less than stride"),
    "causal and truncated": ({"is_causal": True, "is_truncated": True}, ValueError, "got both"),
    "scale": ({"scale": -1.0}, ValueError, "must not be negative"),
    "backend": ({"backend": "cuda"}, ValueError, "'gather' or 'triton'"),
    "triton without a GPU": ({"backend": "triton"}, ValueError, "needs CUDA tensors"),
    "half extra": ({"extra_key": torch.zeros(1, 4, 2, 16)}, ValueError, "go together"),
    "extra shape": ({n: torch.zeros(1, 4, 1, 16) for n in ("extra_key", "extra_value")},
                    ValueError, "extra_key must be"),
}  # fmt: skip


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(change, error, message):
    arguments = {"query": GRID, "key": GRID, "value": GRID, "kernel_size": 3} | change
    tokens = [arguments.pop(name) for name in ("query", "key", "value")]
    with pytest.raises(error, match=message):
        neighborhood_attention(*tokens, **arguments)


def test_opcheck_and_compile_without_a_graph_break(problems):
    tokens = [x.unflatten(1, (5, 7)) for x in problems.random_tokens(1, 35, 35, 2, 16)]
    query, *rest = tokens
    windows = [3, 1, 1, False, 0, False, 4, 2, 1, False, 1, True]
    op = torch.ops.diffaccel.neighborhood_attention.default
    torch.library.opcheck(op, (query, rest + [None] * 4, windows, 0.25, True, "gather"))

    def run(query):
        return neighborhood_attention(query, *tokens[1:], (3, 4), stride=(1, 2)) * 2

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens[0]), run(tokens[0]))
