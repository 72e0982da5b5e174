"""TokenMergingAttn: against its definition token by token, its limits, on a real pipeline."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from diffaccel import TokenLayout, TokenMergingAttn, set_attn_processor
from diffaccel.kernels import dense_attention, reference
from diffaccel.layout import Segment


def build(merge=0.5, cell=2, **knobs):
    return TokenMergingAttn(merge, cell, **{"least_tokens": 0} | knobs)


def drawn(layout, batch=2, heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, layout.length, heads, dim
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def expected_groups(method, key, grid):
    """Which tokens become one, for one sample and frame, by lists."""
    cell, (height, width) = method.cell, grid
    targets = []
    for top in range(0, height, cell):
        for left in range(0, width, cell):
            # the place nearest to the middle of a whole cell, the first of equals
            row = min(top + (cell - 1) // 2, height - 1)
            column = min(left + (cell - 1) // 2, width - 1)
            targets.append(row * width + column)
    features = key.double().mean(1)
    joins = {}
    for token in set(range(height * width)) - set(targets):
        scores = cosine_similarity(features[token][None], features[targets])
        joins[token] = float(scores.max()), targets[int(scores.argmax())]
    count = min(int(method.merge * height * width), len(joins))
    leaving = sorted(joins, key=lambda token: -joins[token][0])[:count]
    staying = [token for token in range(height * width) if token not in leaving]
    final = [joins[token][1] if token in leaving else token for token in range(height * width)]
    return torch.tensor([staying.index(token) for token in final]), len(staying)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "text", "merge", "cell", "batch", "dim"),
    [
        ((7, 9), 0, 0.5, 2, 3, 40),
        ((12, 5), 6, 0.3, 3, 1, 64),
        ((1, 111), 4, 0.9, 2, 1, 72),
        ((8, 8), 0, 0.99, 4, 2, 256),
    ],
    ids=["7x9-B3-D40", "12x5-T6-D64", "1x111-T4-D72", "8x8-D256"],
)
def test_equals_attention_among_the_merged(
    size, text, merge, cell, batch, dim, dtype, assert_close_to_oracle, poisoned_empty
):
    layout, method = TokenLayout.image(*size, text_before=text), build(merge, cell)
    tokens = drawn(layout, batch, 2, dim, dtype)
    inputs = [x[:, text:] for x in tokens]
    found = [expected_groups(method, key, size) for key in inputs[1]]
    group, number = torch.stack([ids for ids, _ in found]), found[0][1]
    assert torch.equal(method.groups(inputs[1], layout), group)
    expected = reference.attention(*tokens)[0]
    twin = dense_attention(*tokens).double() - expected
    expected[:, text:] = reference.groups.merged_attention(
        inputs, group, number, scale=dim**-0.5, text=(tokens[1][:, :text], tokens[2][:, :text])
    )
    output, density = method.attend_with_density(*tokens, layout)
    assert_close_to_oracle(output, expected, twin=expected + twin)
    visual = size[0] * size[1]
    share = 1 - (1 - (number / visual) ** 2) * (visual / layout.length) ** 2
    assert density == pytest.approx(share)


def test_equal_tokens_merge_without_loss():
    """Every token four times: three quarters merge, and dense attention comes out."""
    layout = TokenLayout.image(8, 12, text_after=5)
    tokens = drawn(layout, dtype=torch.float64)
    for x in tokens:
        coarse = x[:, :24].reshape(2, 4, 6, 2, 16)
        x[:, :96] = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    method = build(0.75)
    assert method.merged(layout) == 72
    output = method.attend(*tokens, layout)
    torch.testing.assert_close(output, dense_attention(*tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("method", "layout", "reason"),
    [
        (build(0.0), TokenLayout.image(8, 8), "merge=0.0 with cell=2 merges none of 64 tokens"),
        (build(0.5, 1), TokenLayout.image(8, 8), "merges none"),
        (TokenMergingAttn(), TokenLayout.image(31, 33), "below least_tokens=1024"),
        (build(), TokenLayout((Segment("text", 40),)), "no visual tokens"),
    ],
    ids=["merge", "cell", "few", "text alone"],
)
def test_where_nothing_merges_it_is_dense_bit_for_bit(method, layout, reason):
    tokens = drawn(layout)
    output, density = method.attend_with_density(*tokens, layout)
    assert torch.equal(output, dense_attention(*tokens)) and density == 1.0
    assert reason in method.shape_reason(layout)
    assert method.expected_cost(layout, "cpu") is None


def test_constant_values_stay_constant():
    layout = TokenLayout.image(9, 7, text_before=4)
    query, key, value = drawn(layout)
    constant = value[:, :1].expand_as(value)
    output = build(0.7).attend(query, key, constant, layout)
    torch.testing.assert_close(output, constant, atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence():
    layout = TokenLayout.image(9, 8, text_before=5)
    query, key, value = drawn(layout, batch=3)
    valid = torch.ones(3, 77, dtype=torch.bool)
    valid[0, 3:5] = valid[1, 30:60] = valid[2, 5:] = False
    poisoned = [x.masked_fill(~valid[..., None, None], torch.nan) for x in (query, key, value)]
    method = build(0.6)
    output = method.attend(*poisoned, layout, key_padding_mask=valid)
    group = method.groups(poisoned[1][:, 5:], layout, valid[:, 5:])
    number = 72 - method.merged(layout)
    for sample, real in enumerate(valid):
        one = [x[sample : sample + 1].nan_to_num(0.0) for x in poisoned]
        expected = reference.attention(*one, real[None, None, None])[0]
        expected[:, 5:] = reference.groups.merged_attention(
            tuple(x[:, 5:] for x in one),
            group[sample : sample + 1],
            number,
            scale=0.25,
            text=(one[1][:, :5][:, real[:5]], one[2][:, :5][:, real[:5]]),
            valid=real[None, 5:],
        )
        torch.testing.assert_close(
            output[sample, real].double(), expected[0, real], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("merge", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(merge):
    with pytest.raises(ValueError, match="merge must be at least 0 and below 1, got merge="):
        TokenMergingAttn(merge)


@pytest.mark.usefixtures("one_thread")
def test_on_a_pipeline(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    stock = tiny.sample()
    with set_attn_processor(tiny.pipe, build(0.4)) as attachment:
        first, again = tiny.sample(), tiny.sample()
        layers = attachment.report().layers
    assert torch.equal(first, again) and not torch.equal(first, stock)
    assert all(layer.sparse_calls and layer.density < 0.5 for layer in layers)
    assert torch.equal(tiny.sample(), stock)
