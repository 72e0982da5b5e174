"""Every class whose rotary positions can be scaled: each axis alone, in the right place."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS
from watched import WatchedAttn

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.bindings import binding_of
from diffaccel.bindings.rope import Linear, scaled_rope
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
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tiny.angle_error)
        last = scaled.select(number, tiny.grid[number] - 1)
        assert not torch.allclose(last, plain.select(number, tiny.grid[number] - 1), atol=1e-5)
    assert torch.equal(tiny.predict(), stock)


@pytest.mark.parametrize("name", ROTARY)
def test_a_factor_of_one_changes_nothing(name):
    tiny = MODELS[name]()
    stock = tiny.predict()
    with scaled_rope(tiny.model, frames=Linear(1.0), height=Linear(1.0), width=Linear(1.0)):
        torch.testing.assert_close(tiny.predict(), stock, rtol=1e-4, atol=1e-5)
