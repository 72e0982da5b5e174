"""Every bound denoiser class: its tokens are where the binding says, and methods reach them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny_models import MODELS

from diffaccel.attach.attachment import restore_attn_processor, set_attn_processor
from diffaccel.bindings import BINDINGS, ModelCall, binding_of
from diffaccel.methods import FullAttn, NeighborhoodAttn, RectifiedSpaAttn

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = NeighborhoodAttn((1, 3, 3), dense_steps=0, dense_layers=())
SPARSE = {"block": 16, "first_frame": False, "dense_steps": 0, "dense_layers": ()}
LOCAL = [name for name, build in MODELS.items() if build().is_local]


@cache
def built(name):
    tiny = MODELS[name]()
    return tiny, tiny.predict()


@pytest.fixture(params=MODELS)
def case(request):
    tiny, stock = built(request.param)
    yield tiny, stock
    restore_attn_processor(tiny.model)


@pytest.fixture(params=LOCAL)
def local(request):
    return built(request.param)


def test_every_bound_class_is_tested():
    assert {name.partition(":")[0] for name in MODELS} == set(BINDINGS)


def test_tokens_are_where_the_layout_says(local):
    """Without diffaccel: where attention is local, what moves lies around what was changed."""
    tiny, _ = local
    frames, height, width = tiny.grid
    place = (frames - 1, 1, width - 2)
    with tiny.windowed(blind_text=True):
        before = tiny.predict()
        moved = tiny.moved(before, tiny.predict(tiny.changed(place)))
    reach = len(tiny.layer_names()) + len(tiny.others) * 2
    where = torch.cartesian_prod(*map(torch.arange, tiny.grid)).reshape(*tiny.grid, 3)
    away = (where - torch.tensor(place)).abs()
    assert moved[place] > 0
    assert moved[frames - 1, 0, width - 2] > 0 and moved[frames - 1, 1, width - 1] > 0
    assert not moved[away[..., 0] > 0].any()
    # A window at an edge is moved inside, so that its last row sees one further.
    is_far = (away[..., 1] > reach + 1) | (away[..., 2] > reach + 1)
    assert is_far.any() and not moved[is_far].any()


def test_one_window_reaches_exactly_its_tokens(case):
    """The binding's layout, by a window method against stock attention under the same window."""
    tiny, stock = case
    with tiny.windowed():
        expected = tiny.predict()
    assert not torch.allclose(expected, stock, atol=1e-3)
    with set_attn_processor(tiny.model, WINDOWS, always=True) as attachment:
        output = tiny.predict()
        layers = attachment.report().denoisers[0].layers
    assert {layer.name for layer in layers} == tiny.layer_names()
    assert all(layer.sparse_calls for layer in layers), attachment.report()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)


def test_full_attention_and_restoring_are_bit_identical(case):
    tiny, stock = case
    before = snapshot(tiny.model)
    attachment = set_attn_processor(tiny.model, FullAttn())
    assert torch.equal(tiny.predict(), stock)
    report = attachment.report().denoisers[0]
    assert {layer.name for layer in report.layers} == tiny.layer_names()
    assert len(report.skipped) == tiny.skipped and all(report.skipped.values())
    assert all(layer.dense_calls for layer in report.layers), attachment.report()
    attachment.remove()
    assert snapshot(tiny.model) == before
    assert torch.equal(tiny.predict(), stock)


def test_keeping_everything_is_stock_and_dropping_half_is_not(case):
    tiny, stock = case
    set_attn_processor(tiny.model, RectifiedSpaAttn(drop=0.0, **SPARSE), always=True)
    everything = tiny.predict()
    half = RectifiedSpaAttn(drop=0.5, p_remain=0.0, neighbors=False, **SPARSE)
    set_attn_processor(tiny.model, half, always=True)
    dropped = tiny.predict()
    torch.testing.assert_close(everything, stock, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(dropped).all()
    assert (dropped - stock).abs().max() > 10 * (everything - stock).abs().max()


@torch.no_grad()
def test_an_example_call_is_whole_and_has_the_layouts_of_a_real_one(case):
    tiny, _ = case
    binding = binding_of(tiny.model)
    call = binding.example_call(tiny.model, tiny.latent_size, tiny.text, batch=tiny.batch)
    assert len(tiny.predict(call)) == tiny.batch
    grids = {binding.layout(tiny.model, ModelCall(call, {}), layer).grid
             for layer in binding.layers(tiny.model)}  # fmt: skip
    assert grids == {layout.grid for layout in tiny.layouts.values()}
    assert binding.latents in call


def test_family_native_size_and_blocks_are_told(case):
    tiny, _ = case
    binding = binding_of(tiny.model)
    assert binding.family(tiny.model, None)
    layers = binding.layers(tiny.model)
    assert all(binding.native(tiny.model, layer) for layer in layers)
    assert all(tiny.model.get_submodule(stage) for stage in binding.stages(tiny.model))


def snapshot(model):
    """What attaching may touch: processor objects, their attributes, hooks, module attributes."""
    processors = [
        (name, id(module.processor), dict(vars(module.processor)), sorted(vars(module)))
        for name, module in model.named_modules()
        if hasattr(module, "processor")
    ]
    hooks = (dict(model._forward_pre_hooks), dict(model._forward_pre_hooks_with_kwargs))
    return processors, hooks, sorted(vars(model))
