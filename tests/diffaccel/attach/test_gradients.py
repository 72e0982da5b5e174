"""Gradients: where they are needed, layers run dense as stock ones, and say so."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from diffaccel import (
    AgentAttn,
    FullAttn,
    HeadPerturbation,
    NeighborhoodAttn,
    SparseAttn,
    TokenLayout,
    TokenMergingAttn,
)
from diffaccel.attach.attachment import set_attn_processor
from diffaccel.attach.state import state_of
from diffaccel.errors import ModelError
from diffaccel.kernels import (
    block_sparse_attention,
    block_statistics,
    neighborhood_attention,
    select_blocks,
)

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=()),
    NeighborhoodAttn(4, dense_steps=0, dense_layers=()),
    AgentAttn(least_tokens=0, stop=1.0, dense_steps=0, dense_layers=()),
    TokenMergingAttn(least_tokens=0, dense_steps=0, dense_layers=()),
]
REASON = "gradients are needed, and methods are for inference"


def call_of(tiny):
    """Returns the denoiser, and the arguments of its first call in a run."""
    model = next(iter(tiny.denoisers().values()))
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny.sample()
    hook.remove()
    args, kwargs = calls[0]
    return model, args, kwargs


def gradients(model, args, kwargs):
    """Returns the gradients of all weights, and the output."""
    model.zero_grad()
    output = model(*args, **kwargs)[0]
    output.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), found


@pytest.mark.parametrize("name", ["wan2.1", "sd15", "flux"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_training_is_that_of_the_stock_model(tiny_pipelines, name, method):
    tiny = tiny_pipelines.BUILDERS[name]()
    model, args, kwargs = call_of(tiny)
    stock, expected = gradients(model, args, kwargs)
    attachment = set_attn_processor(model, method, always=True)
    with pytest.warns(UserWarning, match=REASON):
        output, found = gradients(model, args, kwargs)
    assert torch.equal(output, stock) and found.keys() == expected.keys()
    assert all(torch.equal(found[weight], expected[weight]) for weight in found)
    dense = [layer.dense_calls for layer in attachment.report().layers if layer.dense_calls]
    assert any(REASON in reasons for reasons in dense)
    with torch.no_grad():
        assert not torch.equal(model(*args, **kwargs)[0], stock)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_need_no_gradients(tiny_pipelines, checkpointing):
    """As in LoRA training: only what is trained asks for them."""
    tiny = tiny_pipelines.wan21()
    model, args, kwargs = call_of(tiny)
    model.requires_grad_(False)
    attachment = set_attn_processor(model, METHODS[0], always=True)
    model(*args, **kwargs)
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    model.blocks[0].attn1.to_q.weight.requires_grad_(True)
    attachment.reset()
    with pytest.warns(UserWarning, match=REASON):
        model(*args, **kwargs)[0].sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["wan2.1", "sd15", "flux"])
@pytest.mark.parametrize("method", [FullAttn(), METHODS[0]], ids=["full", "sparse"])
def test_compiled_training_is_that_of_the_stock_model(tiny_pipelines, name, method):
    torch._dynamo.reset()
    tiny = tiny_pipelines.BUILDERS[name]()
    model, args, kwargs = call_of(tiny)
    stock, expected = gradients(model, args, kwargs)
    attachment = set_attn_processor(model, method, always=True)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    output, found = gradients(model, args, kwargs)
    torch.testing.assert_close(output, stock, rtol=1e-4, atol=1e-5)
    for weight, gradient in found.items():
        torch.testing.assert_close(gradient, expected[weight], rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1
    if method is METHODS[0]:
        assert REASON in attachment.report().layers[-1].dense_calls
    torch._dynamo.reset()


def test_compiled_training_refuses_guidance(tiny_pipelines):
    torch._dynamo.reset()
    tiny = tiny_pipelines.flux()
    model, args, kwargs = call_of(tiny)
    hook = tiny.pipe.set_guidance(HeadPerturbation(heads=((1, 0),)), scale=2.0)
    for hooks in state_of(model).hooks.values():
        for one in hooks:
            one.is_active = True
    layer = next(
        processor._diffaccel_layer
        for processor in model.attn_processors.values()
        if hasattr(processor, "_diffaccel_layer")
    )
    tokens = [torch.randn(1, 108, 2, 16) for _ in range(3)]
    with pytest.raises(ModelError, match="has no gradients in a compiled model"):
        torch.ops.diffaccel.attend(*tokens, None, None, layer.handle, 3)
    hook.remove()


def test_the_operation_has_gradients(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    set_attn_processor(tiny.pipe, FullAttn())
    tiny.sample()
    handle = tiny.pipe.transformer.transformer_blocks[1].attn.processor._diffaccel_layer.handle
    tokens = [torch.randn(1, 108, 2, 16, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.diffaccel.attend, (*tokens, None, None, handle, 3))
    output = torch.ops.diffaccel.attend(*tokens, None, None, handle, 1)
    with pytest.raises(RuntimeError, match="computed without gradients"):
        output.sum().backward()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_direct_call_that_needs_gradients_runs_dense(method):
    layout = TokenLayout.image(12, 8, text_before=3)
    tokens = [torch.randn(1, layout.length, 2, 16, requires_grad=True) for _ in range(3)]
    output, density = method.attend_with_density(*tokens, layout)
    dense = FullAttn().attend(*tokens, layout)
    assert density == 1.0 and torch.equal(output, dense)
    found = torch.autograd.grad(output.square().sum(), tokens)
    expected = torch.autograd.grad(dense.square().sum(), tokens)
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert method.attend_with_density(*tokens, layout)[1] < 1.0


def test_operations_refuse_backward_in_a_sentence():
    query, key, value = (torch.randn(1, 32, 2, 16, requires_grad=True) for _ in range(3))
    indices, counts = torch.zeros(1, 2, 2, 1).int(), torch.ones(1, 2, 2).int()
    blocks = {"block_q": 16, "block_k": 16}
    outputs = {
        "block_sparse_attention": block_sparse_attention(
            query, key, value, indices, counts, **blocks
        ),
        "neighborhood_attention": neighborhood_attention(query, key, value, 3),
        "block_statistics": block_statistics(query, key, value, 16).key_mean,
    }
    for name, output in outputs.items():
        with pytest.raises(RuntimeError, match=f"{name} is for inference.*torch.no_grad"):
            output.sum().backward()
    chosen, _ = select_blocks(torch.rand(1, 2, 2, 4, requires_grad=True), 2)
    assert not chosen.requires_grad
