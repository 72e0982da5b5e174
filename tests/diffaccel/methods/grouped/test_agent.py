"""AgentAttn: against the product of its two maps, its limits, its schedule, on real pipelines."""

from itertools import product

import pytest
import torch
from torch.nn.functional import cosine_similarity

from diffaccel import AgentAttn, FullAttn, TokenLayout, TokenMergingAttn, set_attn_processor
from diffaccel.kernels import dense_attention, reference
from diffaccel.layout import Segment
from diffaccel.methods.inputs import VisualTokens

MODES = ("pool", "middle", "match")


def build(cell=2, agents="pool", **knobs):
    return AgentAttn(cell, agents, **{"least_tokens": 0, "most_agents": None} | knobs)


def drawn(layout, batch=2, heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, layout.length, heads, dim
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def middle_tokens(cells, valid):
    """The real token nearest to the middle of each cell (B, n), place by place."""
    numbers = reference.groups.cell_numbers(cells.grid, cells.size)
    places = list(product(*map(range, cells.grid)))
    found = torch.zeros(len(valid), cells.number, dtype=torch.long)
    for sample, cell in product(range(len(valid)), range(cells.number)):
        members = [token for token, number in enumerate(numbers) if number == cell]
        real = [token for token in members if valid[sample, token]] or members[:1]
        distance = [
            sum((p % s - (s - 1) / 2) ** 2 for p, s in zip(places[token], cells.size, strict=True))
            for token in real
        ]
        found[sample, cell] = real[distance.index(min(distance))]
    return found


def expected_agents(method, query, key, layout, valid):
    """Agents and counts in fp64, token by token; also which cell each token belongs to."""
    cells = method.cells(layout.grid)
    numbers = reference.groups.cell_numbers(cells.grid, cells.size)
    group = torch.tensor(numbers).expand(len(query), -1).clone()
    middles = middle_tokens(cells, valid)
    if method.agents == "match":
        key = key.double().mean(2)
        for sample, token in product(range(len(query)), range(len(numbers))):
            scores = cosine_similarity(key[sample, token][None], key[sample, middles[sample]])
            scores[~valid[sample, middles[sample]]] = -2
            if token not in middles[sample]:
                group[sample, token] = scores.argmax()
    means, counts = reference.groups.group_means(query, group, cells.number, valid)
    if method.agents == "middle":
        means = torch.stack([row[at] for row, at in zip(query.double(), middles, strict=True)])
    return means.masked_fill((counts == 0)[..., None, None], 0.0), counts


def oracle(method, query, key, value, layout, valid=None):
    """The whole sequence in fp64: text rows dense, visual rows by explicit maps.

    Padding among the text must be the same in all samples.
    """
    mask = None if valid is None else valid[:, None, None]
    output = reference.attention(query, key, value, mask)[0]
    if valid is None:
        valid = torch.ones(query.shape[:2], dtype=torch.bool)
    visual = layout.visual_slice
    is_text = torch.ones(layout.length, dtype=torch.bool)
    is_text[visual] = False
    is_text &= valid[0]
    inputs = [x[:, visual] for x in (query, key, value)]
    agents, counts = expected_agents(method, *inputs[:2], layout, valid[:, visual])
    scale, has_text = query.shape[-1] ** -0.5, bool(is_text.any())
    output[:, visual] = reference.groups.agent_attention(
        inputs,
        agents,
        scales=(scale, scale ** (1.0 if method.scale_power is None else method.scale_power)),
        shortcut=method.shortcut or 0.0,
        counts=counts if has_text else (counts > 0),
        text=(key[:, is_text], value[:, is_text]) if has_text else None,
        valid=valid[:, visual],
    )
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("agents", MODES)
@pytest.mark.parametrize(
    ("layout", "cell", "batch", "dim"),
    [
        (TokenLayout.image(7, 9), 2, 3, 40),
        (TokenLayout.image(1, 111), (1, 5), 1, 64),
        (TokenLayout.image(13, 6, text_before=5), (3, 2), 2, 72),
        (TokenLayout.image(8, 12, text_before=3, text_after=4), 4, 1, 128),
        (TokenLayout.video(3, 5, 7, text_after=6), (2, 2, 3), 1, 80),
        (TokenLayout.image(10, 10), 3, 1, 256),
    ],
    ids=["7x9-B3-D40", "1x111-D64", "13x6-T5-D72", "8x12-T7-D128", "3x5x7-T6-D80", "10x10-D256"],
)
def test_equals_the_product_of_two_maps(
    layout, cell, batch, dim, agents, dtype, assert_close_to_oracle, poisoned_empty
):
    tokens = drawn(layout, batch, 2, dim, dtype)
    method = build(cell, agents, scale_power=0.8, shortcut=0.1)
    expected = oracle(method, *tokens, layout)
    dense_error = dense_attention(*tokens).double() - reference.attention(*tokens)[0]
    output, density = method.attend_with_density(*tokens, layout)
    assert_close_to_oracle(output, expected, twin=expected + dense_error)
    assert output.dtype == dtype
    agents, visual = method.cells(layout.grid).number, layout.visual.length
    others = layout.length**2 - visual**2
    assert density == pytest.approx((2 * agents * visual + others) / layout.length**2)


@pytest.mark.parametrize("dim", [40, 64, 72, 80, 128])
def test_the_constants_of_agentsd_in_fp64(dim):
    layout = TokenLayout.image(9, 7)
    query, key, value = drawn(layout, dim=dim, dtype=torch.float64)
    method = build(3).resolved("sd15", 16)
    agents, _ = expected_agents(method, query, key, layout, torch.ones(2, 63, dtype=torch.bool))
    expected = reference.groups.agent_attention(
        (query, key, value), agents, scales=(dim**-0.5, dim**-0.15), shortcut=0.075
    )
    output = method.attend(query, key, value, layout)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_the_constants_of_agentsd_in_half_precision(dim, dtype, assert_close_to_oracle):
    layout = TokenLayout.image(9, 7)
    tokens = drawn(layout, batch=3, dim=dim, dtype=dtype)
    method = build(3).resolved("sdxl", 70)
    expected = oracle(method, *tokens, layout)
    dense_error = dense_attention(*tokens).double() - reference.attention(*tokens)[0]
    assert_close_to_oracle(method.attend(*tokens, layout), expected, expected + dense_error)


@pytest.mark.parametrize("agents", MODES)
def test_padding_has_no_influence(agents):
    layout = TokenLayout.image(9, 8, text_before=6)
    query, key, value = drawn(layout, batch=3)
    valid = torch.ones(3, layout.length, dtype=torch.bool)
    valid[0, 3:6] = valid[1, 30:60] = valid[2, 6:] = False
    valid[1, 7] = valid[1, 15] = False
    poisoned = [x.masked_fill(~valid[..., None, None], torch.nan) for x in (query, key, value)]
    method = build(3, agents)
    output = method.attend(*poisoned, layout, key_padding_mask=valid)
    clean = [x.masked_fill(~valid[..., None, None], 0.0) for x in (query, key, value)]
    for sample in (0, 1):
        one = [x[sample : sample + 1] for x in clean]
        real = valid[sample]
        expected = oracle(method, *one, layout, valid[sample : sample + 1])[0][real]
        torch.testing.assert_close(output[sample, real].double(), expected, atol=1e-5, rtol=1e-5)
    text = output[2, :6].double()  # a sample whose picture is all padding
    expected = reference.attention(*(x[2:, :6] for x in clean))[0][0]
    torch.testing.assert_close(text, expected, atol=1e-5, rtol=1e-5)


def test_padding_without_text():
    layout = TokenLayout.image(9, 8)
    query, key, value = drawn(layout)
    valid = torch.ones(2, 72, dtype=torch.bool)
    valid[0, 40:] = False
    method = build(3, scale_power=0.5)
    output = method.attend(query, key, value, layout, key_padding_mask=valid)
    expected = oracle(method, query, key, value, layout, valid)
    torch.testing.assert_close(output[valid].double(), expected[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "layout", "reason"),
    [
        (build(1), TokenLayout.image(6, 9, text_after=3), "54 agents save no work on 54 visual"),
        (build((1, 2)), TokenLayout.image(8, 8), "32 agents save no work on 64 visual"),
        (AgentAttn(), TokenLayout.image(31, 33), "1023 visual tokens are below least_tokens=1024"),
        (build(), TokenLayout((Segment("text", 40),)), "no visual tokens"),
    ],
    ids=["one each", "half", "few", "text alone"],
)
def test_where_agents_save_nothing_it_is_dense_bit_for_bit(method, layout, reason):
    tokens = drawn(layout)
    output, density = method.attend_with_density(*tokens, layout)
    assert torch.equal(output, dense_attention(*tokens)) and density == 1.0
    assert reason in method.shape_reason(layout)
    assert method.expected_cost(layout, "cpu") is None


def test_one_agent_below_half_the_tokens_is_enough():
    layout = TokenLayout.image(8, 9)
    tokens = drawn(layout)
    assert build((2, 1)).cells(layout.grid).number == 36  # half: dense
    assert build((2, 1)).attend_with_density(*tokens, layout)[1] == 1.0
    assert build((3, 1)).attend_with_density(*tokens, layout)[1] < 1.0


@pytest.mark.parametrize("agents", MODES)
@pytest.mark.parametrize("text", [0, 5])
def test_constant_values_come_back(agents, text):
    layout = TokenLayout.image(9, 7, text_before=text)
    query, key, value = drawn(layout)
    constant = value[:, :1].expand_as(value)
    plain = build(3, agents).attend(query, key, constant, layout)
    torch.testing.assert_close(plain, constant, atol=1e-5, rtol=1e-5)
    more = build(3, agents, shortcut=0.075).attend(query, key, constant, layout)
    visual = layout.visual_slice
    torch.testing.assert_close(more[:, visual], 1.075 * constant[:, visual])
    assert torch.equal(more[:, :text], plain[:, :text])


def test_text_rows_are_dense_bit_for_bit():
    layout = TokenLayout.image(8, 12, text_before=5, text_after=2)
    tokens = drawn(layout)
    output, dense = build(4).attend(*tokens, layout), dense_attention(*tokens)
    for part in layout.exact_slices:
        expected = dense_attention(tokens[0][:, part], *tokens[1:])
        assert torch.equal(output[:, part], expected)
    torch.testing.assert_close(output[:, :5], dense[:, :5])
    assert (output - dense).abs().max() > 0.01


def test_the_count_gives_the_picture_its_mass():
    """With one key for all the picture and agents equal to it, agents are exact."""
    layout = TokenLayout.image(9, 10, text_before=7)
    query, key, value = drawn(layout, dtype=torch.float64)
    method = build(4, "middle")
    cells = method.cells(layout.grid)
    key[:, 7:] = key[:, 7:8]
    middles = 7 + middle_tokens(cells, torch.ones(1, 90, dtype=torch.bool))[0]
    query[:, middles] = key[:, 7:8]
    output = method.attend(query, key, value, layout)
    expected = dense_attention(query, key, value)
    # Agents gather the mean value, which is what dense attention gives the picture's part.
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    uncounted = reference.groups.agent_attention(
        tuple(x[:, 7:] for x in (query, key, value)),
        query[:, middles],
        scales=(0.25, 0.25),
        text=(key[:, :7], value[:, :7]),
    )
    assert (uncounted - expected[:, 7:]).abs().max() > 0.05


def test_middle_agents_keep_rotated_queries_whole():
    """Of one vector, rotated by position, the middle token is exact and the mean too short."""
    layout = TokenLayout.image(1, 64)
    turned = torch.polar(torch.ones(64), 0.9 * torch.arange(64.0))
    query = torch.view_as_real(turned)[None, :, None]
    cells = build((1, 4)).cells(layout.grid)
    assert cells.means(query).tokens.norm(dim=-1).max() < 0.7
    method = build((1, 4), "middle")
    agents = method._agents(VisualTokens(query, query, query, None, layout, 1.0)).tokens
    assert torch.equal(agents, query[:, 1::4])


@pytest.mark.parametrize("agents", MODES)
def test_samples_and_heads_do_not_mix(agents):
    layout = TokenLayout.image(9, 7, text_after=3)
    tokens = drawn(layout, batch=3, heads=4)
    method = build(3, agents)
    output = method.attend(*tokens, layout)
    samples = [x[[2, 0, 1]] for x in tokens]
    torch.testing.assert_close(method.attend(*samples, layout), output[[2, 0, 1]])
    heads = [x[:, :, [3, 1, 0, 2]] for x in tokens]
    torch.testing.assert_close(method.attend(*heads, layout), output[:, :, [3, 1, 0, 2]])


def test_only_its_part_of_the_schedule_has_agents():
    layout = TokenLayout.image(9, 8)
    tokens = drawn(layout)
    dense, method = dense_attention(*tokens), build(3, start=0.2, stop=0.6, dense_steps=1)
    active = [not torch.equal(method.attend(*tokens, layout, progress=p / 10), dense)
              for p in range(10)]  # fmt: skip
    assert active == [2 <= p < 6 for p in range(10)]
    assert method.attend_with_density(*tokens, layout)[1] < 1.0
    assert method.attend_with_density(*tokens, layout, step=0, progress=0.3)[1] == 1.0
    merging = TokenMergingAttn(0.4, least_tokens=0)
    both = build(3, start=0.2, stop=0.6, late=merging)
    late = both.attend(*tokens, layout, progress=0.6)
    assert torch.equal(late, merging.attend(*tokens, layout))
    assert torch.equal(both.attend(*tokens, layout, progress=0.2), method.attend(*tokens, layout))


def test_families_get_what_suits_them():
    unet = AgentAttn().resolved("sdxl", 70)
    assert (unet.agents, unet.scale_power, unet.shortcut) == ("pool", 0.3, 0.075)
    assert (unet.start, unet.stop, unet.cell) == (0.0, 0.4, 4)
    flux = AgentAttn(shortcut=0.1).resolved("flux", 57)
    assert (flux.agents, flux.scale_power, flux.shortcut) == ("middle", 1.0, 0.1)
    assert AgentAttn().resolved("sd3", 24).agents == "pool"
    late = AgentAttn(late=TokenMergingAttn()).resolved("wan2.1-t2v", 30).late
    assert late.dense_steps == 5


def test_defaults_serve_both_levels_of_sdxl_at_its_native_size():
    for side in (64, 32):
        assert AgentAttn().shape_reason(TokenLayout.image(side, side)) == ""


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"cell": 0}, "cell must be"),
        ({"agents": "mean"}, "one of pool, middle, match, got agents='mean'"),
        ({"most_agents": 0}, "most_agents must be"),
        ({"start": 0.4}, "0 <= start < stop <= 1, got start=0.4, stop=0.4"),
        ({"stop": 1.1}, "stop"),
        ({"scale_power": -0.1}, "scale_power"),
        ({"shortcut": float("nan")}, "shortcut"),
        ({"least_tokens": -1}, "least_tokens"),
        ({"dense_steps": -1}, "dense_steps"),
    ],
    ids=str,
)
def test_bad_knobs_are_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        AgentAttn(**knobs)


def test_what_is_late_must_be_another_method():
    for late in (AgentAttn(), FullAttn, "dense"):
        with pytest.raises(TypeError, match="late must be another attention method"):
            AgentAttn(late=late)


def test_cross_attention_is_refused():
    layout = TokenLayout.image(8, 8)
    query, key, value = drawn(layout)
    with pytest.raises(ValueError, match="one shape"):
        build().attend(query, key[:, :7], value[:, :7], layout)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3", "qwen"])
@pytest.mark.slow
def test_on_pipelines(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    stock = tiny.sample(num_inference_steps=5)
    calls = tiny.calls // tiny_pipelines.STEPS  # in one step; guidance may take two
    method = AgentAttn(2, least_tokens=0)
    for _ in range(2):
        with set_attn_processor(tiny.pipe, method) as attachment:
            first, again = (tiny.sample(num_inference_steps=5) for _ in range(2))
            report = attachment.report().denoisers[0]
        assert torch.equal(first, again) and not torch.equal(first, stock)
        assert len(report.layers) == next(iter(tiny.layers.values()))
        outside = dict.fromkeys((2, 3, 4), "outside start=0.0 to stop=0.4")
        assert report.steps == 5 and report.dense_steps == outside
        for layer in report.layers:
            assert layer.sparse_calls == 2 * calls
            assert layer.dense_calls == {outside[2]: 3 * calls}
        assert torch.equal(tiny.sample(num_inference_steps=5), stock)
    with set_attn_processor(tiny.pipe, AgentAttn()) as attachment:
        assert torch.equal(tiny.sample(num_inference_steps=5), stock)
        for layer in attachment.report().layers:
            assert any("below least_tokens=1024" in reason for reason in layer.dense_calls)
