"""What SlidingWindowAttn computes: its variants, the native window, the report of its work."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch

from diffaccel import NeighborhoodAttn, SlidingWindowAttn, TokenLayout, set_attn_processor
from diffaccel.kernels import dense_attention, neighborhood_attention, reference

LAYOUT = TokenLayout.video(2, 9, 14, text_before=2, text_after=3)


def drawn(layout, batch=2, heads=2, dim=24):
    generator = torch.Generator().manual_seed(0)
    shape = batch, layout.length, heads, dim
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def pairs_of(variant, length, window, layer, tile):
    """Which keys a query sees along one axis, from the words of the documentation."""
    half, seen = window // 2, torch.zeros(length, length, dtype=torch.bool)
    cuts = list(range(-half if variant == "shifted" and layer % 2 else 0, length, window))
    for query in range(length):
        if variant == "inward":
            first = min(max(query - half, 0), length - window)
            seen[query, first : first + window] = True
        elif variant == "truncated":
            seen[query, max(query - half, 0) : max(query - half + window, 0)] = True
        elif variant == "tile":
            middle = min(query // tile * tile + tile // 2, length - 1)
            first = min(max(middle - half, 0), length - window)
            seen[query, first : first + window] = True
        elif cuts[0] < 0:
            start = max(cut for cut in cuts if cut <= query)
            seen[query, max(start, 0) : start + window] = True
        else:
            start = min(max(cut for cut in cuts if cut <= query), length - window)
            seen[query, start : start + window] = True
    return seen


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("variant", ["inward", "truncated", "tile", "block", "shifted"])
def test_variants_equal_dense_attention_under_their_mask(variant, layer):
    method = SlidingWindowAttn((4, 6), variant=variant, tile=2)
    tokens = drawn(LAYOUT)
    mask = torch.ones(2, 2, dtype=torch.int)
    for length, window in ((9, 4), (14, 6)):
        mask = torch.kron(mask, pairs_of(variant, length, window, layer, 2).int())
    whole = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    whole[LAYOUT.visual_slice, LAYOUT.visual_slice] = mask.bool()
    output, density = method.attend_with_density(*tokens, LAYOUT, layer=layer)
    expected = reference.attention(*tokens, whole[None, None])[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert density == pytest.approx(whole.float().mean().item())


@pytest.mark.parametrize("length", range(20, 60, 7))
@pytest.mark.parametrize("half", [7, 9])
def test_the_three_forms_of_the_inward_window_agree(length, half):
    seen = pairs_of("inward", length, 2 * half + 1, 0, 1)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    low = query - half - (half + query - length + 1).clamp(min=0)
    high = query + half + (half - query).clamp(min=0)
    assert torch.equal(seen, (key >= low) & (key <= high))
    stretched = half + torch.maximum(half - query, query - (length - half - 1)).clamp(min=0)
    assert torch.equal(seen, (query - key).abs() <= stretched)
    assert torch.equal(seen, reference.neighborhood_mask(length, 2 * half + 1))


def test_the_window_is_the_native_size_rounded_up_to_odd():
    layout = replace(TokenLayout.video(21, 68, 120), native=(21, 30, 52))
    assert SlidingWindowAttn().window_on(layout) == (21, 31, 53)
    assert SlidingWindowAttn(variant="block").window_on(layout) == (21, 30, 52)
    assert SlidingWindowAttn(16).window_on(layout) == (21, 16, 16)
    with pytest.raises(ValueError, match="window=None takes the size"):
        SlidingWindowAttn().attend(*drawn(LAYOUT), LAYOUT)


def test_at_native_size_it_is_dense_bit_for_bit():
    layout = replace(LAYOUT, native=(1, 9, 14))
    tokens = drawn(layout)
    assert torch.equal(SlidingWindowAttn().attend(*tokens, layout), dense_attention(*tokens))


def test_token_growth_sharpens_the_scores_of_visual_queries():
    layout = replace(LAYOUT, native=(1, 5, 7))
    method = SlidingWindowAttn(token_growth=2.0)
    assert method.temperature(layout) == pytest.approx(sqrt(log(70) / log(35)))
    published = replace(layout, native=(21, 30, 52))
    assert method.temperature(published) == pytest.approx(1.0461, abs=1e-4)
    query, key, value = drawn(layout)
    output = method.attend(query, key, value, layout)
    text, visual = layout.exact_slices, layout.visual_slice
    assert torch.equal(output[:, text[0]], dense_attention(query[:, text[0]], key, value))
    others = (torch.cat([x[:, part] for part in text], 1) for x in (key, value))
    expected = neighborhood_attention(
        *(x[:, visual].unflatten(1, layout.grid) for x in (query, key, value)),
        (2, 5, 7),
        scale=24**-0.5 * method.temperature(layout),
        **dict(zip(("extra_key", "extra_value"), others, strict=True)),
    )
    assert torch.equal(output[:, visual], expected.flatten(1, 3))


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("flux", (1, 64, 64)),
        ("qwen", (1, 83, 83)),
        ("wan2.1", (21, 30, 52)),
        ("hunyuan", (33, 45, 80)),
        ("ltx", (21, 16, 22)),
    ],
)
def test_bindings_tell_the_native_size(tiny_pipelines, watched, name, native):
    tiny = tiny_pipelines.BUILDERS[name]()
    set_attn_processor(tiny.pipe, watched)
    tiny.sample(num_inference_steps=1)
    assert {call.layout.native for call in watched.calls} == {native}


def test_the_native_size_of_a_unet_halves_with_each_level(tiny_pipelines, watched):
    tiny = tiny_pipelines.BUILDERS["sd15"]()
    set_attn_processor(tiny.pipe, watched)
    tiny.sample(num_inference_steps=1)
    size = tiny.pipe.unet.config.sample_size
    levels = {call.layout.native for call in watched.calls}
    assert levels == {(1, size >> level, size >> level) for level in range(len(levels))}


@pytest.mark.usefixtures("one_thread")
def test_the_report_states_what_the_kernel_visits(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    with set_attn_processor(tiny.pipe, SlidingWindowAttn((3, 5)), always=True) as attachment:
        tiny.sample(num_inference_steps=1)
        report = attachment.report()
    for layer in report.layers:
        assert layer.density == pytest.approx(layer.visited.ideal)
        assert layer.density <= layer.visited.visited <= 1.0
    assert "visited" in str(report) and "ideal" in str(report)


def test_published_neighborhoods():
    method = NeighborhoodAttn.like("flux-4k", dense_steps=2)
    assert method == NeighborhoodAttn((80, 80), (16, 16), dense_steps=2)
    layout = TokenLayout.image(256, 256)
    assert method.expected_cost(layout, "cuda") * 0.6 == pytest.approx((80 / 256) ** 2)
    with pytest.raises(ValueError, match="flux-4k, flux-4k-sliding"):
        NeighborhoodAttn.like("flux")


def test_causal_frames_see_no_later_frame():
    layout = TokenLayout.video(4, 5, 6)
    query, key, value = drawn(layout)
    method = NeighborhoodAttn((3, 5, 6), is_causal=True)
    changed = [x.clone() for x in (key, value)]
    for tensor in changed:
        tensor[:, 60:] = 0.0
    before, after = (method.attend(query, *x, layout) for x in ((key, value), changed))
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.equal(before[:, 60:], after[:, 60:])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"window": 0}, "window must be"),
        ({"variant": "round"}, "variant must be one of"),
        ({"tile": 2.5}, "tile must be"),
        ({"token_growth": 0.5}, "token_growth must be at least 1"),
        ({"token_growth": float("nan")}, "token_growth must be at least 1"),
        ({"dense_layers": -1}, "dense_layers"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttn(**knobs)
