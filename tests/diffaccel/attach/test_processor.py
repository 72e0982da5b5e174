"""Attached processors: one kernel is replaced, everything else is the stock processor."""

from __future__ import annotations

import inspect
import warnings

import diffusers
import pytest
import torch
from diffusers.hooks import apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)

from diffaccel.attach.attachment import restore_attn_processor, set_attn_processor
from diffaccel.attach.processor import attached_class, stock_of
from diffaccel.attach.state import as_padding_mask
from diffaccel.bindings import FluxBinding
from diffaccel.layout import TokenLayout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flux(tiny_pipelines):
    return tiny_pipelines.flux()


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan2.1", "hunyuan", "ltx", "sdxl"])
def test_attached_processors_look_like_their_stock_class(tiny_pipelines, watched, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    (model,) = tiny.denoisers().values()
    set_attn_processor(tiny.pipe, watched)
    processors = [part.processor for part in model.modules() if hasattr(part, "processor")]
    ours = [processor for processor in processors if stock_of(processor) is not None]
    assert len(ours) == sum(tiny.layers.values())
    assert len({type(processor) for processor in ours}) == 1
    for processor in ours:
        stock = stock_of(processor)
        assert isinstance(processor, type(stock))
        assert inspect.signature(processor.__call__) == inspect.signature(stock.__call__)


def test_guiders_that_look_up_by_class_know_attached_processors():
    stock = AttentionProcessorRegistry.get(FluxAttnProcessor)
    assert AttentionProcessorRegistry.get(attached_class(FluxAttnProcessor)) is stock


def test_backend_stays_with_the_stock_processor(flux, watched):
    """The chosen backend serves dense calls; a method does not meet it; it comes back."""
    active = _AttentionBackendRegistry.get_active_backend()
    attention = flux.pipe.transformer.transformer_blocks[0].attn
    attention.processor._attention_backend = AttentionBackendName.FLEX
    set_attn_processor(flux.pipe, watched)
    assert attention.processor._attention_backend is AttentionBackendName.FLEX

    attention.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    assert stock_of(attention.processor)._attention_backend is AttentionBackendName._NATIVE_MATH
    attention.processor._parallel_config = "config"
    assert stock_of(attention.processor)._parallel_config == "config"
    attention.processor._parallel_config = None
    flux.sample()
    assert watched.calls

    restore_attn_processor(flux.pipe)
    assert attention.processor._attention_backend is AttentionBackendName._NATIVE_MATH
    assert _AttentionBackendRegistry.get_active_backend() == active


def test_wrong_layout_runs_dense_and_says_so_once(flux, watched, monkeypatch):
    stock = flux.sample()
    attachment = set_attn_processor(flux.pipe, watched)

    mistaken = TokenLayout.image(8, 11, text_before=12)
    monkeypatch.setattr(FluxBinding, "layout", lambda self, model, call, layer: mistaken)
    with pytest.warns(UserWarning, match="has 100 tokens, the layer got 108") as caught:
        output = flux.sample()
    assert len(caught) == 1
    assert torch.equal(output, stock) and not watched.calls
    report = attachment.report()
    assert all("100 tokens" in next(iter(layer.dense_calls)) for layer in report.layers)
    assert list(report.denoisers[0].dense_steps) == [0, 1]


def test_a_call_that_hides_its_layout_runs_dense(tiny_pipelines, watched):
    """Coordinates instead of the grid, as LTX condition pipelines pass them, of no raster."""
    model = tiny_pipelines.ltx().pipe.transformer
    attachment = set_attn_processor(model, watched)
    arguments = {
        "hidden_states": torch.randn(1, 24, 8),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([1.0]),
        "encoder_attention_mask": torch.ones(1, 5),
        "video_coords": torch.rand(1, 3, 24),
    }
    with torch.no_grad(), pytest.warns(UserWarning, match="no video that is half"):
        model(**arguments)
    assert not watched.calls
    assert attachment.report().layers[0].dense_calls


def test_scrambled_position_ids_run_dense(flux, watched):
    model = flux.pipe.transformer
    set_attn_processor(model, watched)
    with torch.no_grad(), pytest.warns(UserWarning, match="raster order"):
        model(
            hidden_states=torch.randn(1, 24, 16),
            encoder_hidden_states=torch.randn(1, 5, 32),
            pooled_projections=torch.randn(1, 32),
            timestep=torch.tensor([1.0]),
            img_ids=torch.randint(0, 6, (24, 3)) * torch.tensor([0, 1, 1]),
            txt_ids=torch.zeros(5, 3),
        )
    assert not watched.calls


def test_image_prompts_keep_their_own_attention(flux, watched):
    """An IP-Adapter attends twice: only the joint part goes to the method."""
    model = flux.pipe.transformer
    for block in model.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32)
        block.attn.set_processor(processor.eval())
    arguments = {
        "hidden_states": torch.randn(1, 96, 16),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(12.0)),
        "txt_ids": torch.zeros(12, 3),
        "joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]},
    }
    with torch.no_grad():
        stock = model(**arguments).sample
        names = set(model.state_dict())
        set_attn_processor(model, watched)
        output = model(**arguments).sample
        assert set(model.state_dict()) == names
        for block in model.transformer_blocks:
            block.attn.processor.scale = [0.5]
        restore_attn_processor(model)
        restored = model(**arguments).sample
    assert torch.equal(output, stock)
    # A scale set meanwhile is the user's: it stays.
    assert {tuple(block.attn.processor.scale) for block in model.transformer_blocks} == {(0.5,)}
    assert not torch.equal(restored, stock)
    assert {call.shape[1] for call in watched.calls} == {108}
    assert set(model.state_dict()) == names
    assert type(model.transformer_blocks[0].attn.processor) is FluxIPAdapterAttnProcessor


def test_a_processor_without_sdpa_is_reported(tiny_pipelines, watched):
    tiny = tiny_pipelines.sd15()
    tiny.pipe.enable_attention_slicing(1)
    stock = tiny.sample()
    attachment = set_attn_processor(tiny.pipe, watched)
    with pytest.warns(UserWarning, match="SlicedAttnProcessor does not compute"):
        assert torch.equal(tiny.sample(), stock)
    assert not watched.calls
    assert attachment.report().density == 1.0


def test_guider_that_skips_attention_scores_keeps_its_effect(tiny_pipelines, watched):
    """Perturbed attention replaces SDPA around the layer; a method must not undo it."""
    tiny = tiny_pipelines.qwen()
    plain = tiny.sample()
    attachment = set_attn_processor(tiny.pipe, watched)
    config = diffusers.LayerSkipConfig(
        indices=[0],
        fqn="transformer_blocks",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    # Applied to attached processors: diffusers finds them in its table by exact class.
    apply_layer_skip(tiny.pipe.transformer, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        perturbed = tiny.sample()
    assert {call.layer for call in watched.calls} == {1}
    skipped, served = attachment.report().layers
    assert skipped.left_out == served.sparse_calls == tiny.calls
    assert not skipped.sparse_calls and not skipped.dense_calls and skipped.density is None
    assert f"{tiny.calls} without attention" in str(skipped)
    restore_attn_processor(tiny.pipe)
    assert torch.equal(tiny.sample(), perturbed)
    assert not torch.equal(perturbed, plain)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[True, False, True]]), [[True, False, True]] * 2),
        (torch.tensor([[[[True, False, True]]]]), [[True, False, True]] * 2),
        (torch.tensor([True, True, False]).expand(2, 1, 1, 3), [[True, True, False]] * 2),
        (torch.tensor([[[[0.0, -1e4, float("-inf")]]]]), [[True, False, False]] * 2),
        (torch.tensor([[[[0.0, -1.5, 0.0]]]]), None),
        (torch.ones(3, 3, dtype=torch.bool), [[True] * 3] * 2),
        (torch.ones(2, 4, 1, 3, dtype=torch.bool), [[True] * 3] * 2),
        (torch.ones(2, 1, 3, 3, dtype=torch.bool), [[True] * 3] * 2),
        (torch.ones(3, 3, dtype=torch.bool).tril(), None),
    ],
    ids=[
        "row",
        "one-sample",
        "batch",
        "additive",
        "bias",
        "square",
        "per-head",
        "per-query",
        "causal",
    ],
)
def test_which_masks_are_key_padding(mask, expected):
    found = as_padding_mask(mask, batch=2, length=3)
    assert (None if found is None else found.tolist()) == expected


def test_attached_processors_have_no_closures(flux, watched):
    """PyTorch 2.8 guards what it finds under `__class__`, which names the stock class."""
    set_attn_processor(flux.pipe, watched)
    processor = flux.pipe.transformer.transformer_blocks[0].attn.processor
    assert type(processor) is not processor.__class__
    assert type(processor).__call__.__closure__ is None


def test_no_warning_in_ordinary_runs(flux, watched):
    set_attn_processor(flux.pipe, watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        flux.sample()
