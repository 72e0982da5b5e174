"""What attached layers remember within a run, and schedules that depend on its length."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffaccel import RectifiedSpaAttn, SparseAttn, restore_attn_processor, set_attn_processor
from diffaccel.cli.options.method_options import parse_method

pytestmark = pytest.mark.usefixtures("one_thread")

KNOBS = {"block": 16, "dense_layers": (), "first_frame": False}
REMEMBERING = SparseAttn(0.5, order="auto", reuse=3, hysteresis=0.2, dense_steps=0, **KNOBS)


def attach(tiny, method):
    return set_attn_processor(tiny.pipe, method, always=True)


@pytest.mark.parametrize("family", ["flux", "sd15", "wan2.1", "hunyuan"])
def test_runs_remember_nothing_of_each_other(tiny_pipelines, family):
    """Guidance in one batch, in two calls, and none; a second run equals the first."""
    tiny = tiny_pipelines.BUILDERS[family]()
    attachment = attach(tiny, REMEMBERING)
    first = tiny.sample(num_inference_steps=4)
    report = attachment.report()
    second = tiny.sample(seed=1, num_inference_steps=4)
    assert torch.equal(tiny.sample(num_inference_steps=4), first)
    assert attachment.report() == report
    attach(tiny, REMEMBERING)
    assert torch.equal(tiny.sample(seed=1, num_inference_steps=4), second)
    layers = report.layers
    assert all(set(layer.orders) <= {"raster", "brick"} and layer.orders for layer in layers)
    assert all(len(layer.orders) <= 1 for layer in layers)
    assert 0 < sum(layer.reused_calls for layer in layers)
    assert all(layer.reused_calls <= 0.75 * layer.sparse_calls for layer in layers)
    layer = max(layers, key=lambda layer: layer.reused_calls)
    assert f"order {layer.orders[0]}, " in str(layer)
    assert f" sparse ({layer.reused_calls} with earlier block lists)" in str(layer)


def test_a_fixed_order_without_reuse_is_no_news(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    attachment = attach(tiny, SparseAttn(0.5, order="raster", dense_steps=0, **KNOBS))
    tiny.sample()
    assert "order raster, " not in str(attachment.report().layers[0])
    assert "block lists" not in str(attachment.report())


def test_pipelines_that_share_a_model_share_nothing_else(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    other = tiny_pipelines.flux()
    other.pipe = diffusers.FluxPipeline(
        **{**tiny.pipe.components, "scheduler": other.pipe.scheduler}
    )
    other.pipe.set_progress_bar_config(disable=True)
    attachment = attach(tiny, REMEMBERING)
    alone = tiny.sample(num_inference_steps=3), attachment.report()
    other.sample(seed=5, num_inference_steps=3)
    again = tiny.sample(num_inference_steps=3), attachment.report()
    assert torch.equal(alone[0], again[0]) and alone[1] == again[1]


@pytest.mark.parametrize("how", ["remove", "restore", "replace"])
def test_what_is_remembered_goes_with_the_method(tiny_pipelines, how):
    tiny = tiny_pipelines.flux()
    attachment = attach(tiny, REMEMBERING)
    tiny.sample()
    memories = attachment._methods["transformer"]._memories.values()
    assert all(memory._remembered for memory in memories)
    told = [layer.orders for layer in attachment.report().layers]
    {
        "remove": attachment.remove,
        "restore": lambda: restore_attn_processor(tiny.pipe),
        "replace": lambda: attach(tiny, SparseAttn(0.5, **KNOBS)),
    }[how]()
    assert not any(memory._remembered for memory in memories)
    assert [layer.orders for layer in attachment.report().layers] == told


def test_layers_of_one_model_remember_apart(tiny_pipelines):
    """What one layer remembers is that of its own calls alone."""
    tiny = tiny_pipelines.wan21()
    attachment = attach(tiny, REMEMBERING)
    tiny.sample(num_inference_steps=3, height=128, width=192)
    memories = attachment._methods["transformer"]._memories
    kept = [
        [remembered["selection"].kept for remembered in memory._remembered.values()]
        for memory in memories.values()
    ]
    assert [len(selections) for selections in kept] == [2, 2]  # two passes of guidance
    first, second = kept
    assert not any(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("build", "steps", "expected"),
    [("wan21", 4, (0,)), ("wan21", 10, (1,)), ("wan22", 4, (0, 0)), ("wan22_ti2v", 2, (0,))],
)
def test_published_dense_steps_shrink_with_the_run(tiny_pipelines, build, steps, expected):
    tiny = getattr(tiny_pipelines, build)()
    attachment = attach(tiny, RectifiedSpaAttn(0.5, neighbors=False, **KNOBS))
    before = [part.method for part in attachment.report().denoisers]
    tiny.sample(num_inference_steps=steps)
    parts = attachment.report().denoisers
    assert [len(part.dense_steps) for part in parts] == list(expected)
    for part, count, old in zip(parts, expected, before, strict=True):
        assert f"dense_steps={count}," in part.method
        assert f"dense_steps={count}," not in old  # published for 50 or 40 steps
    assert attachment.report().layers[0].sparse_calls


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_share_of_the_steps_is_dense_whatever_the_scheduler(tiny_pipelines, name):
    tiny = tiny_pipelines.sd15()
    tiny.pipe.scheduler = getattr(diffusers, name)()
    attachment = attach(tiny, SparseAttn(0.5, dense_steps=0.5, **KNOBS))
    for steps, dense in ((6, [0, 1, 2]), (5, [0, 1])):
        tiny.sample(num_inference_steps=steps)
        (denoiser,) = attachment.report().denoisers
        assert list(denoiser.dense_steps) == dense
        assert set(denoiser.dense_steps.values()) == {"dense_steps=0.5"}


def test_density_follows_the_steps_of_a_run(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    plain = {"selector": "pooled", "corrector": "none", "dense_steps": 0, **KNOBS}

    def layer_of(method):
        attachment = attach(tiny, method)
        tiny.sample(num_inference_steps=4)
        return attachment.report().layers[0], attachment.report().denoisers[0]

    falling, denoiser = layer_of(SparseAttn(1.0, keep_end=0.2, **plain))
    assert list(denoiser.dense_steps) == [0] and falling.sparse_calls == 3
    each = [layer_of(SparseAttn(keep, **plain))[0].density for keep in (0.8, 0.6, 0.4)]
    assert falling.density == pytest.approx((1.0 + sum(each)) / 4, abs=1e-6)


def test_the_command_line_has_these_knobs():
    words = (
        "keep=0.4",
        "keep_end=0.1",
        "reuse=2",
        "hysteresis=0.2",
        "dense_steps=.2",
        "order=auto",
    )
    assert parse_method("sparse", words) == SparseAttn(
        0.4, keep_end=0.1, reuse=2, hysteresis=0.2, dense_steps=0.2, order="auto"
    )
    assert parse_method("rectified", ("drop_end=0.9",)) == RectifiedSpaAttn(drop_end=0.9)


def test_a_promised_error_is_in_the_report(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    method = SparseAttn(max_error=0.6, block=16, dense_steps=0, dense_layers=())
    with set_attn_processor(tiny.pipe, method, always=True) as attachment:
        tiny.sample()
        report = attachment.report()
    assert 0.0 <= report.worst_error <= 0.6
    for layer in report.layers:
        assert 0.0 <= layer.error <= layer.worst_error
        assert "error" in str(layer)
    with set_attn_processor(tiny.pipe, SparseAttn(0.5, block=16), always=True) as attachment:
        tiny.sample()
        assert attachment.report().worst_error is None
