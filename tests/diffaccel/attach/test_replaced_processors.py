"""Processors that come and go after a method was attached: nothing crashes or is lost silently."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

from diffaccel import (
    FullAttn,
    HeadPerturbation,
    NormalizedAttention,
    SkipLayers,
    SparseAttn,
    restore_attn_processor,
    set_attn_processor,
    set_guidance,
)
from diffaccel.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
REPLACEMENTS = {
    "fuse": ("sdxl", lambda tiny: tiny.pipe.unet.fuse_qkv_projections()),
    "fuse sd15": ("sd15", lambda tiny: tiny.pipe.fuse_qkv_projections()),
    "fuse cogvideox": ("cogvideox", lambda tiny: tiny.pipe.transformer.fuse_qkv_projections()),
    "slicing": ("sdxl", lambda tiny: tiny.pipe.enable_attention_slicing()),
    "default": ("sdxl", lambda tiny: tiny.pipe.unet.set_default_attn_processor()),
    "own": ("sd15", lambda tiny: tiny.pipe.unet.set_attn_processor(AttnProcessor2_0())),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_lost_method_is_told_once_and_reported(tiny_pipelines, name):
    family, replace = REPLACEMENTS[name]
    tiny = tiny_pipelines.BUILDERS[family]()
    stock = tiny.sample()
    for _ in range(2):  # told again for a method that was attached again
        attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
        replace(tiny)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert (tiny.sample() - stock).norm() < 1e-4 * stock.norm()
            tiny.sample()
        told = [str(w.message) for w in seen if "no longer serves" in str(w.message)]
        assert len(told) == 1 and told[0].startswith("SparseAttn no longer serves")
        (denoiser,) = attachment.report().denoisers
        for layer in denoiser.layers:
            assert "replaced" in denoiser.skipped[layer.name]
        assert "not called" not in str(attachment.report())
    restore_attn_processor(tiny.pipe)


@pytest.mark.parametrize("guidance", [HeadPerturbation(layers=(1,)), NormalizedAttention], ids=str)
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_lost_guidance_is_refused_before_the_run(tiny_pipelines, name, guidance):
    family, replace = REPLACEMENTS[name]
    tiny = tiny_pipelines.BUILDERS[family]()
    if guidance is NormalizedAttention:
        guidance = NormalizedAttention(tiny.arguments["negative_prompt_embeds"])
    model = next(iter(tiny.denoisers().values()))
    called = []
    for part in model.children():
        part.register_forward_hook(lambda *_: called.append(None))
    # What is refused does not wait for the first step that is guided.
    attachment = set_guidance(tiny.pipe, guidance, start=0.5)
    replace(tiny)
    with pytest.raises(ModelError, match="replaced after it was set; call set_guidance again"):
        tiny.sample(guidance_scale=1.0)
    assert not called
    attachment.remove()
    assert not model._forward_pre_hooks
    tiny.sample()


def test_guidance_at_processors_that_it_cannot_reach_is_refused_at_once(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    tiny.pipe.enable_attention_slicing(1)
    stock, negative = tiny.sample(), NormalizedAttention(tiny.arguments["negative_prompt_embeds"])
    for guidance in (HeadPerturbation(layers=(1,)), negative):
        with pytest.raises(ModelError, match="SlicedAttnProcessor does not compute"):
            set_guidance(tiny.pipe, guidance)
        assert not tiny.pipe.unet._forward_pre_hooks and not tiny.pipe.unet._forward_hooks
        assert torch.equal(tiny.sample(), stock)
    with set_guidance(tiny.pipe, SkipLayers((1,))):
        assert not torch.equal(tiny.sample(), stock)


def test_one_denoiser_that_refuses_leaves_the_other_unguided(tiny_pipelines):
    tiny = tiny_pipelines.wan22()
    for layer in tiny.pipe.transformer_2.blocks:
        layer.attn1.set_processor(SlicedAttnProcessor(1))
    with pytest.raises(ModelError, match="SlicedAttnProcessor does not compute"):
        set_guidance(tiny.pipe, HeadPerturbation(layers=(1,)))
    for model in tiny.denoisers().values():
        assert not model._forward_pre_hooks and not model._forward_hooks


def test_diffusers_sees_the_stock_classes(tiny_pipelines):
    tiny = tiny_pipelines.sdxl()
    before = {name: p.__class__ for name, p in tiny.pipe.unet.attn_processors.items()}
    set_attn_processor(tiny.pipe, FullAttn())
    assert {name: p.__class__ for name, p in tiny.pipe.unet.attn_processors.items()} == before
    made = next(iter(tiny.pipe.unet.attn_processors.values())).__class__()
    assert type(made) is AttnProcessor2_0


def test_self_attention_that_reads_text_has_its_reason(tiny_pipelines):
    tiny = tiny_pipelines.sd15()
    for name, module in tiny.pipe.unet.named_modules():
        if name.endswith("up_blocks.1.attentions.0.transformer_blocks.0"):
            module.only_cross_attention = True
            module.attn1 = module.attn2
    attachment = set_attn_processor(tiny.pipe, FullAttn())
    tiny.sample()
    for layer in attachment.report().layers:
        assert layer.dense_calls or layer.sparse_calls, layer


def test_a_model_runs_in_one_thread_at_a_time(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    expected = tiny.sample()
    model, problems = tiny.pipe.transformer, []

    def meanwhile(*_):
        def attach():
            for act in (lambda: set_attn_processor(model, FullAttn()), tiny.sample):
                with pytest.raises(ModelError, match="in another"):
                    act()
                problems.append(None)

        thread = threading.Thread(target=attach)
        thread.start()
        thread.join()

    handle = model.transformer_blocks[0].register_forward_hook(meanwhile)
    assert torch.equal(tiny.sample(), expected)
    handle.remove()
    assert len(problems) >= 2
    results = []
    thread = threading.Thread(target=lambda: results.append(tiny.sample()))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)
    attachment.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_failed_call_lets_others_call(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    set_attn_processor(tiny.pipe, METHOD, always=True)

    def fail(*_):
        raise RuntimeError("stopped")

    handle = tiny.pipe.transformer.transformer_blocks[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        tiny.sample()
    handle.remove()
    results = []
    thread = threading.Thread(target=lambda: results.append(tiny.sample()))
    thread.start()
    thread.join()
    assert len(results) == 1
