"""Dtypes at the seam: attached layers take part in autocast as stock ones do, and keep fp64."""

from __future__ import annotations

import pytest
import torch

from diffaccel import (
    AgentAttn,
    FullAttn,
    HeadPerturbation,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SparseAttn,
    TokenLayout,
)
from diffaccel.attach.attachment import set_attn_processor

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("flux", "sd3", "qwen", "hunyuan", "wan2.1", "sd15")
EVERYTHING = SparseAttn(keep=0.5, block=16, neighbors=False, dense_steps=0, dense_layers=())


def slow_but(quick):
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES]


@pytest.mark.parametrize("name", slow_but(("sd3", "qwen", "hunyuan")))
def test_full_attention_under_autocast_is_stock(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = tiny.sample()
        set_attn_processor(tiny.pipe, FullAttn())
        assert torch.equal(tiny.sample(), stock)
        attachment = set_attn_processor(tiny.pipe, EVERYTHING, always=True)
        sparse = tiny.sample()
    assert sparse.dtype == stock.dtype and sparse.isfinite().all()
    assert all(layer.sparse_calls for layer in attachment.report().layers)


def test_guidance_acts_under_autocast(tiny_pipelines):
    tiny = tiny_pipelines.sd3()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = tiny.sample()
        with tiny.pipe.set_guidance(HeadPerturbation(heads=((1, 0),), strength=0.7), scale=2.0):
            guided = tiny.sample()
        assert torch.equal(tiny.sample(), stock)
    assert guided.dtype == stock.dtype and not torch.equal(guided, stock)


def test_a_whole_graph_takes_part_in_autocast(tiny_pipelines):
    tiny = tiny_pipelines.sd3()
    set_attn_processor(tiny.pipe, EVERYTHING, always=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = tiny.sample()
        tiny.pipe.transformer.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(tiny.sample(), eager, rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()


def test_layers_see_one_dtype_under_autocast(tiny_pipelines):
    """The methods of another dtype than bf16 would be computed in it."""
    seen = []

    class Recorded(type(EVERYTHING)):
        __slots__ = ()

        def compute(self, inputs, position):
            seen.append({x.dtype for x in (inputs.query, inputs.key, inputs.value)})
            assert not torch.is_autocast_enabled("cpu")
            return SparseAttn.compute(self, inputs, position)

    tiny = tiny_pipelines.sd3()
    method = Recorded(keep=0.5, block=16, dense_steps=0, dense_layers=())
    set_attn_processor(tiny.pipe, method, always=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny.sample()
    assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)


@pytest.mark.parametrize(
    "method",
    [EVERYTHING, NeighborhoodAttn(4, dense_steps=0, dense_layers=()), AgentAttn(least_tokens=0)],
    ids=lambda method: type(method).__name__,
)
def test_a_model_in_fp64_is_computed_in_fp64(tiny_pipelines, method):
    model = tiny_pipelines.sd15().pipe.unet
    sample, text = torch.randn(1, 4, 24, 16), torch.randn(1, 7, model.config.cross_attention_dim)
    set_attn_processor(model, method, always=True)
    with torch.no_grad():
        narrow = model(sample, torch.tensor(999), text).sample
        wide = model.double()(sample.double(), torch.tensor(999), text.double()).sample
    assert wide.dtype == torch.float64 and narrow.dtype == torch.float32
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    """It is what factories give: counts of tokens would round in bf16."""
    layout = TokenLayout.image(24, 24, text_after=5)
    query, key, value = (torch.randn(1, layout.length, 2, 16) for _ in range(3))
    methods = [
        EVERYTHING,
        RectifiedSpaAttn(0.7, block=32),
        RectifiedSpaAttn(0.7, block=32, correction="centroids"),
        NeighborhoodAttn(5),
        AgentAttn(least_tokens=0),
    ]
    expected = [method.attend(query, key, value, layout) for method in methods]
    try:
        torch.set_default_dtype(dtype)
        found = [method.attend(query, key, value, layout) for method in methods]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["flux", "wan2.1"])
def test_weights_stored_in_fp8_are_computed_as_stock(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    for model in tiny.denoisers().values():
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stock = tiny.sample()
    set_attn_processor(tiny.pipe, FullAttn())
    assert torch.equal(tiny.sample(), stock)
    attachment = set_attn_processor(tiny.pipe, EVERYTHING, always=True)
    assert tiny.sample().isfinite().all()
    assert all(layer.sparse_calls for layer in attachment.report().layers)
