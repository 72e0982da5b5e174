"""Every class whose rotary positions can be scaled: each axis alone, in the right place."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS
from watched import WatchedAttn

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.bindings import UnsupportedModelError, binding_of
from diffaccel.bindings.passed_tables import rescaled_rows
from diffaccel.bindings.rope import Linear, Ntk, Yarn, scaled_rope
from diffaccel.methods.inputs import Attended

pytestmark = pytest.mark.usefixtures("one_thread")
AXES = ("frames", "height", "width")
ROTARY = [name for name, build in MODELS.items() if binding_of(build().model).scales_rope]


class FirstQuery(WatchedAttn):
    """Keeps the first queries that it gets, on the visual grid."""

    def compute(self, inputs, position):
        if not self.calls:
            visual = inputs.query[0, inputs.layout.visual_slice]
            self.calls.append(visual.unflatten(0, inputs.layout.grid))
        return Attended(inputs.dense(), 1.0)


def first_query(tiny):
    method = FirstQuery()
    with set_attn_processor(tiny.model, method, always=True):
        tiny.predict(tiny.uniform())
    return method.calls[0]


@pytest.mark.parametrize("name", ROTARY)
def test_interpolation_by_two_gives_every_other_token_the_position_of_the_one_before(name):
    tiny = MODELS[name]()
    stock, plain = tiny.predict(), first_query(tiny)
    for number, axis in enumerate(AXES):
        half = tiny.grid[number] - tiny.origin[number]
        if half < 3:
            continue
        with scaled_rope(tiny.model, **{axis: Linear(2.0)}):
            scaled = first_query(tiny)
        count = (half + 1) // 2
        start = tiny.origin[number]
        expected = plain.narrow(number, start, count)
        found = scaled.narrow(number, start, half)
        found = found.index_select(number, torch.arange(0, half, 2))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tiny.wave_error)
        last = scaled.select(number, tiny.grid[number] - 1)
        stock_last = plain.select(number, tiny.grid[number] - 1)
        assert not torch.allclose(last, stock_last, atol=10 * tiny.wave_error)
    assert torch.equal(tiny.predict(), stock)


@pytest.mark.parametrize("name", ROTARY)
def test_a_factor_of_one_changes_nothing(name):
    tiny = MODELS[name]()
    stock = tiny.predict()
    with scaled_rope(tiny.model, frames=Linear(1.0), height=Linear(1.0), width=Linear(1.0)):
        torch.testing.assert_close(tiny.predict(), stock, rtol=1e-4, atol=tiny.wave_error)


class FirstQueries(WatchedAttn):
    """Keeps all first queries that it gets, and their layout."""

    def compute(self, inputs, position):
        if not self.calls:
            self.calls.append((inputs.query[0].clone(), inputs.layout))
        return Attended(inputs.dense(), 1.0)


def first_queries(tiny):
    method = FirstQueries()
    with set_attn_processor(tiny.model, method, always=True):
        tiny.predict()
    return method.calls[0]


@pytest.mark.parametrize(
    "name",
    [
        "Cosmos3OmniTransformer:sound",
        "Cosmos3OmniTransformer:controls",
        "MiniMaxH3Transformer3DModel:references",
        "QwenImageTransformer2DModel:references",
    ],
)
def test_text_stays_where_it_is_and_the_video_where_it_begins(name):
    tiny = MODELS[name]()
    plain, layout = first_queries(tiny)
    with scaled_rope(tiny.model, frames=Linear(2.0), height=Linear(2.0), width=Linear(2.0)):
        scaled, _ = first_queries(tiny)
    ends = layout.segments[0].length
    assert layout.segments[0].kind == "text"
    close = {"rtol": 1e-4, "atol": tiny.wave_error}
    torch.testing.assert_close(scaled[:ends], plain[:ends], **close)
    origin = (0, *tiny.origin[1:])
    before, after = (
        queries[layout.visual_slice].unflatten(0, layout.grid) for queries in (plain, scaled)
    )
    torch.testing.assert_close(after[origin], before[origin], **close)
    assert not torch.allclose(after[0, -1, -1], before[0, -1, -1], atol=1e-2)


@pytest.mark.parametrize("axis", [Ntk(2.0), Yarn(2.0, 5)])
def test_tables_that_a_pipeline_passes_are_scaled_by_the_formula(axis):
    """CogVideoX's table of rows, against one of the scaled frequencies; a crop keeps its start."""
    begin, count, dim = 3.0, 5, 6
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    places = torch.arange(count, dtype=torch.float64)[:, None]
    step = 0.5
    rows = torch.exp(1j * (begin + step * places) * frequencies)
    expected = axis.amplitude * torch.exp(
        1j * (begin * frequencies + places * axis.rescaled(step * frequencies))
    )
    torch.testing.assert_close(rescaled_rows(rows, axis), expected, rtol=0, atol=1e-9)


def test_learned_frequencies_are_scaled_from_the_fastest_to_the_slowest():
    """Mochi's have either sign and no order: the slowest is interpolated, the fastest kept."""
    tiny = MODELS["MochiTransformer3DModel"]()
    model = tiny.model
    learned = model.pos_frequencies.detach()
    plain = model.rope(learned, 1, 1, 9, dtype=torch.float32)
    seen = []
    with scaled_rope(model, width=Ntk(2.0)):
        for number in range(learned.shape[-1]):
            alone = torch.zeros_like(learned)
            alone[2] = learned[2]
            seen.append(model.rope(alone, 1, 1, 9, dtype=torch.float32)[1][-1, 0, number])
    step = (model.rope.target_area / 9) ** 0.5
    order = learned[2, 0].abs().argsort(descending=True)
    last = learned[2, 0] * 4 * step  # the last column lies four tokens from the middle
    assert seen[order[0]] == pytest.approx(float(last[order[0]].sin()), abs=1e-4)
    assert seen[order[-1]] == pytest.approx(float((last[order[-1]] / 2).sin()), abs=1e-4)
    assert torch.equal(model.rope(learned, 1, 1, 9, dtype=torch.float32)[0], plain[0])


def test_cogvideox_without_rotary_positions_is_refused():
    model = MODELS["CogVideoXTransformer3DModel"]().model
    model.register_to_config(use_rotary_positional_embeddings=False)
    with pytest.raises(UnsupportedModelError, match="table of positions"):
        scaled_rope(model, height=Linear(2.0))
