"""The rectification study: what it captures is what the model attends with."""

from dataclasses import replace

import pytest
import torch

from diffaccel.benchmarks.studies import rectification
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.image.presets import preset_for
from diffaccel.pipelines.loading import load_image_pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EMBEDDED_IMAGE.is_dir(), reason="the embedded model has not been made"),
]


@pytest.fixture(scope="module")
def captured():
    pipe = load_image_pipeline(EMBEDDED_IMAGE, device="cpu")
    preset = replace(preset_for(pipe, EMBEDDED_IMAGE), steps=2)
    calls = rectification.capture(pipe, "a red apple", 384, (1,), preset)
    return pipe, calls


def test_every_layer_of_the_chosen_step_is_captured_once(captured):
    pipe, calls = captured
    blocks = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
    assert [call.layer for call in calls] == list(range(sum(map(len, blocks))))
    assert {call.step for call in calls} == {1}
    assert {call.layout.grid for call in calls} == {(1, 24, 24)}


def test_the_hook_is_gone_afterwards(captured):
    pipe, _ = captured
    assert not pipe.transformer._forward_pre_hooks


def test_keeping_everything_has_no_error(captured):
    _, calls = captured
    with torch.inference_mode():
        rows = rectification.measure(calls, [0.0, 0.5], 64, 0.0)
    assert {row.calls for row in rows} == {len(calls)}
    for row in rows:
        if row.drop:
            assert 0.0 < row.error < 1.0 and row.density < 1.0
        else:
            assert row.error < 1e-6 and row.density == 1.0
