"""Whole graphs: attached layers never break one, and nothing of a run enters it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from diffaccel import HeadPerturbation, NormalizedAttention, SkipLayers, SparseAttn
from diffaccel.attach.attachment import set_attn_processor
from diffaccel.errors import ModelError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("fresh_compiler")]

FAMILIES = (
    *("flux", "sd3", "qwen", "wan2.1", "wan2.2", "wan2.2-ti2v"),
    *("hunyuan", "cogvideox", "ltx", "sd15", "sdxl"),
)
GRAPHS = {"qwen": 2, "wan2.2": 2}
"""Of a stock model compiled whole, where it is not one: two lengths of text, two denoisers."""
SPARSE = SparseAttn(keep=0.5, block=16, dense_steps=1, dense_layers=())
OTHER = SparseAttn(keep=0.25, block=16, dense_steps=0, dense_layers=(0,))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(tiny, way="inplace"):
    """Compiles all denoisers of a pipeline to whole graphs; returns the counter of graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    for name, model in tiny.denoisers().items():
        if way == "wrapped":
            setattr(tiny.pipe, name, torch.compile(model, backend=counter, fullgraph=True))
        elif way == "blocks":
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
        else:
            model.compile(backend=counter, fullgraph=True)
    return counter


def graphs_of_stock(tiny_pipelines, name, way):
    tiny = tiny_pipelines.BUILDERS[name]()
    counter = compiled(tiny, way)
    tiny.sample(num_inference_steps=3)
    torch._dynamo.reset()
    return counter.frame_count


def calls(attachment):
    return [(layer.sparse_calls, layer.dense_calls) for layer in attachment.report().layers]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_graph_serves_all_steps_and_every_method(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    stock = tiny.sample(num_inference_steps=3)
    attachment = set_attn_processor(tiny.pipe, SPARSE, always=True)
    eager, expected = tiny.sample(num_inference_steps=3), calls(attachment)
    other = set_attn_processor(tiny.pipe, OTHER, always=True)
    eager_other, expected_other = tiny.sample(num_inference_steps=3), calls(other)

    attachment = set_attn_processor(tiny.pipe, SPARSE, always=True)
    counter = compiled(tiny)
    for _ in range(2):
        assert torch.equal(tiny.sample(num_inference_steps=3), eager)
        assert calls(attachment) == expected
    assert counter.frame_count == GRAPHS.get(name, 1)

    other = set_attn_processor(tiny.pipe, OTHER, always=True)
    assert torch.equal(tiny.sample(num_inference_steps=3), eager_other)
    assert calls(other) == expected_other
    assert counter.frame_count == GRAPHS.get(name, 1)

    other.remove()
    torch.testing.assert_close(tiny.sample(num_inference_steps=3), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wrapped", "blocks"])
@pytest.mark.parametrize("name", ["flux", "wan2.1", "sdxl"])
def test_other_ways_of_compiling(tiny_pipelines, name, way):
    stock_graphs = graphs_of_stock(tiny_pipelines, name, way)
    tiny = tiny_pipelines.BUILDERS[name]()
    attachment = set_attn_processor(tiny.pipe, SPARSE, always=True)
    eager, expected = tiny.sample(num_inference_steps=3), calls(attachment)
    counter = compiled(tiny, way)
    assert torch.equal(tiny.sample(num_inference_steps=3), eager)
    assert calls(attachment) == expected
    assert counter.frame_count == stock_graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "wan2.1", "sdxl"])
def test_another_size_costs_one_graph_at_most(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    set_attn_processor(tiny.pipe, OTHER, always=True)
    larger = {"height": 128, "width": 160}
    eager = tiny.sample(**larger)
    counter = compiled(tiny)
    tiny.sample()
    assert torch.equal(tiny.sample(**larger), eager)
    assert counter.frame_count <= 2


def test_many_blocks_of_a_kind_are_one_graph(tiny_pipelines):
    """A layer's handle is an input of the graph: a guarded number would compile each block."""
    tiny = tiny_pipelines.wan21()
    blocks = tiny.pipe.transformer.blocks
    blocks.extend(copy.deepcopy(blocks[0]) for _ in range(10))
    set_attn_processor(tiny.pipe, SPARSE, always=True)
    eager = tiny.sample()
    counter = compiled(tiny, "blocks")
    assert torch.equal(tiny.sample(), eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["flux", "wan2.1", "sd15"])
@pytest.mark.slow
def test_damaged_heads_guide_compiled_models(tiny_pipelines, name):
    """A damaged forward has other rows: at most one more graph for another batch size."""
    tiny = tiny_pipelines.BUILDERS[name]()
    perturbation = HeadPerturbation(heads=((1, 0),), strength=0.7)
    with tiny.pipe.set_guidance(perturbation, scale=2.0):
        eager = tiny.sample(num_inference_steps=3)
    plain = tiny.sample(num_inference_steps=3)
    counter = compiled(tiny)
    with tiny.pipe.set_guidance(perturbation, scale=2.0) as guidance:
        guided = tiny.sample(num_inference_steps=3)
        graphs = counter.frame_count
        assert torch.equal(tiny.sample(num_inference_steps=3), guided)
        assert counter.frame_count == graphs <= 2
        assert guidance.report().guided_steps == 3
    torch.testing.assert_close(guided, eager, rtol=1e-4, atol=1e-5)
    assert not torch.equal(guided, plain)


@pytest.mark.slow
def test_normalised_guidance_of_joint_attention_compiles(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    negative = NormalizedAttention(torch.randn(tiny.arguments["prompt_embeds"].shape))
    with tiny.pipe.set_guidance(negative, scale=4.0):
        eager = tiny.sample()
        compiled(tiny)
        torch.testing.assert_close(tiny.sample(), eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiles_first", [True, False], ids=["compiled", "guided"])
def test_what_a_graph_cannot_follow_is_refused_before_it_is_compiled(
    tiny_pipelines, compiles_first
):
    tiny = tiny_pipelines.flux()
    if compiles_first:
        counter = compiled(tiny)
        with pytest.raises(ModelError, match="SkipLayers cannot guide a compiled denoiser"):
            tiny.pipe.set_guidance(SkipLayers((1,)))
        return
    tiny.pipe.set_guidance(SkipLayers((1,)))
    counter = compiled(tiny)
    with pytest.raises(ModelError, match="SkipLayers cannot guide a compiled denoiser"):
        tiny.sample()
    assert counter.frame_count == 0


def test_a_text_cross_attention_that_runs_twice_is_refused(tiny_pipelines):
    tiny = tiny_pipelines.wan21()
    compiled(tiny)
    negative = NormalizedAttention(torch.randn(tiny.arguments["prompt_embeds"].shape))
    with pytest.raises(ModelError, match="cannot guide a compiled denoiser"):
        tiny.pipe.set_guidance(negative)


def test_the_operation_fulfils_its_contract(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    set_attn_processor(tiny.pipe, OTHER, always=True)
    tiny.sample()
    handle = tiny.pipe.transformer.transformer_blocks[1].attn.processor._diffaccel_layer.handle
    tokens = tuple(torch.randn(1, 108, 2, 16) for _ in range(3))
    torch.library.opcheck(torch.ops.diffaccel.attend, (*tokens, None, None, handle, 1))


def test_no_layer_outlives_its_removal(tiny_pipelines):
    from diffaccel.attach.seam import _LAYERS

    before = len(_LAYERS)
    tiny = tiny_pipelines.flux()
    attachment = set_attn_processor(tiny.pipe, SPARSE)
    assert len(_LAYERS) == before + 4
    attachment.remove()
    assert len(_LAYERS) == before
