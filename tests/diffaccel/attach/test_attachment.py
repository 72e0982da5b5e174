"""Attaching a method: what is accepted, what is touched, and that everything comes back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import diffusers
import pytest
import torch

from diffaccel.attach.attachment import restore_attn_processor, set_attn_processor
from diffaccel.attach.pipeline_methods import attach_pipeline_methods
from diffaccel.attach.processor import stock_of
from diffaccel.bindings import UnsupportedModelError
from diffaccel.methods import FullAttn, SparseAttn

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())


@pytest.fixture
def flux(tiny_pipelines):
    return tiny_pipelines.flux()


def processors(model):
    return {name: part.processor for name, part in model.named_modules() if has_processor(part)}


def has_processor(module):
    return hasattr(module, "processor")


def is_stock(model):
    untouched = all(stock_of(processor) is None for processor in processors(model).values())
    return untouched and not model._forward_pre_hooks


# What is accepted


def test_pipelines_get_the_method_once(flux):
    attach_pipeline_methods()
    attach_pipeline_methods()
    with flux.pipe.set_attn_processor(FullAttn()) as attachment:
        assert len(attachment.report().layers) == 4
    assert diffusers.ModularPipeline.set_attn_processor is set_attn_processor


def test_a_pipeline_that_has_the_method_keeps_its_own(monkeypatch):
    def own(pipe, processor):
        return "own"

    monkeypatch.setattr(diffusers.DiffusionPipeline, "set_attn_processor", own, raising=False)
    attach_pipeline_methods()
    assert diffusers.DiffusionPipeline.set_attn_processor is own


@pytest.mark.parametrize("method", [FullAttn, "full", None, torch.nn.Identity()], ids=str)
def test_something_else_than_a_method_is_refused(flux, method):
    with pytest.raises(TypeError, match="method must be an attention method"):
        set_attn_processor(flux.pipe, method)
    assert is_stock(flux.pipe.transformer)


def test_something_else_than_a_pipeline_is_refused():
    with pytest.raises(TypeError, match="target must be a diffusers pipeline or model, got dict"):
        set_attn_processor({}, FullAttn())


def test_unknown_models_are_refused_by_name():
    unet = diffusers.UNet2DModel(
        block_out_channels=(8, 16),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    for model in (unet, torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match=type(model).__name__) as error:
            set_attn_processor(model, FullAttn())
        assert "diffaccel info --models" in str(error.value)
        assert isinstance(error.value, NotImplementedError)


def test_a_pipeline_with_an_unknown_denoiser_is_left_alone(tiny_pipelines):
    pipe = tiny_pipelines.wan22().pipe
    pipe.transformer_2 = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        set_attn_processor(pipe, FullAttn())
    assert is_stock(pipe.transformer)


def test_a_pipeline_without_denoiser_is_refused(flux):
    flux.pipe.transformer = None
    with pytest.raises(UnsupportedModelError, match="FluxPipeline has no denoiser"):
        set_attn_processor(flux.pipe, FullAttn())


def test_user_subclasses_of_supported_models_are_supported(flux):
    class MyTransformer(diffusers.FluxTransformer2DModel):
        pass

    model = MyTransformer.from_config(flux.pipe.transformer.config)
    assert len(set_attn_processor(model, FullAttn()).report().layers) == 4


@pytest.mark.parametrize("name", ["flux", "sd3", "wan2.1", "sd15"])
def test_a_method_given_to_the_model_itself_says_what_to_write(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    (model,) = tiny.denoisers().values()
    model.set_attn_processor(SPARSE)
    with pytest.raises(TypeError, match=r"diffaccel\.set_attn_processor\(model, method\)"):
        tiny.sample()
    with pytest.raises(TypeError, match="load the model again"):
        set_attn_processor(tiny.pipe, SPARSE)


# What is touched, and that it comes back


def test_only_the_denoiser_is_touched(flux):
    vae_before = {name: id(part) for name, part in processors(flux.pipe.vae).items()}
    assert vae_before
    set_attn_processor(flux.pipe, SPARSE)
    assert {name: id(part) for name, part in processors(flux.pipe.vae).items()} == vae_before


def test_setting_again_replaces_and_restore_finds_the_first_originals(flux, watched):
    stock = flux.sample()
    originals = processors(flux.pipe.transformer)
    first = set_attn_processor(flux.pipe, SPARSE)
    second = set_attn_processor(flux.pipe, watched)
    assert len(flux.pipe.transformer._forward_pre_hooks) == 1

    first.remove()
    assert torch.equal(flux.sample(), stock) and watched.calls

    second.remove()
    second.remove()
    assert processors(flux.pipe.transformer) == originals
    assert is_stock(flux.pipe.transformer)


def test_restore_works_on_pipelines_and_models_and_twice(flux):
    originals = processors(flux.pipe.transformer)
    for target in (flux.pipe, flux.pipe.transformer):
        set_attn_processor(flux.pipe, SPARSE)
        restore_attn_processor(target)
        restore_attn_processor(target)
        assert processors(flux.pipe.transformer) == originals
        assert is_stock(flux.pipe.transformer)


def test_restore_after_an_exception_in_the_middle_of_a_run(flux):
    stock = flux.sample()

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with set_attn_processor(flux.pipe, SPARSE):
            flux.sample(callback_on_step_end=stop)
    assert is_stock(flux.pipe.transformer)
    assert torch.equal(flux.sample(), stock)


def test_an_exception_inside_attention_leaves_no_trace(flux, watched_class):
    class Failing(watched_class):
        def compute(self, *args, **kwargs):
            raise FloatingPointError("inside the method")

    stock = flux.sample()
    set_attn_processor(flux.pipe, Failing())
    with pytest.raises(FloatingPointError):
        flux.sample()
    # No kernel swap is left behind: a function called now is the real one.
    assert not torch.overrides._get_current_function_mode_stack()
    restore_attn_processor(flux.pipe)
    assert torch.equal(flux.sample(), stock)


def test_a_processor_set_by_the_user_since_stays(flux):
    attachment = set_attn_processor(flux.pipe, SPARSE)
    attention = flux.pipe.transformer.transformer_blocks[0].attn
    own = type(attention)._default_processor_cls()
    attention.set_processor(own)
    (denoiser,) = attachment.report().denoisers
    assert denoiser.skipped == {
        "transformer_blocks.0.attn": "its processor was replaced after the method was attached"
    }
    restore_attn_processor(flux.pipe)
    assert attention.processor is own
    assert is_stock(flux.pipe.transformer)


def test_attaching_adds_no_reference_cycle(tiny_pipelines):
    """A cycle would keep the weights on the GPU after `del`, until the collector runs."""
    model = tiny_pipelines.wan21().pipe.transformer
    set_attn_processor(model, SPARSE)
    with torch.no_grad():
        model(torch.randn(1, 16, 3, 8, 8), torch.tensor([5.0]), torch.randn(1, 16, 32))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# Runs


def test_two_runs_are_identical_and_a_new_size_is_read(flux):
    set_attn_processor(flux.pipe, SPARSE)
    first = flux.sample()
    flux.sample(height=96, width=64)
    assert torch.equal(flux.sample(), first)


def test_two_pipelines_with_two_methods_do_not_disturb_each_other(tiny_pipelines):
    one, two = tiny_pipelines.flux(), tiny_pipelines.flux()
    other = replace(SPARSE, keep=0.25)
    set_attn_processor(one.pipe, SPARSE)
    alone_one = one.sample()
    set_attn_processor(one.pipe, other)
    alone_two = one.sample()
    assert not torch.equal(alone_one, alone_two)

    set_attn_processor(one.pipe, SPARSE)
    set_attn_processor(two.pipe, other)
    for _ in range(2):
        assert torch.equal(one.sample(), alone_one)
        assert torch.equal(two.sample(), alone_two)


def test_the_report_describes_the_latest_run(tiny_pipelines):
    """Runs of one step do not jump back in time; the scheduler's new timesteps tell them apart."""
    tiny = tiny_pipelines.flux()
    attachment = set_attn_processor(tiny.pipe, SPARSE)
    for steps in (1, 1, 3, 2):
        tiny.sample(num_inference_steps=steps)
        report = attachment.report()
        assert report.denoisers[0].steps == steps
        assert {layer.sparse_calls for layer in report.layers} == {steps}
    attachment.reset()
    report = attachment.report()
    assert report.density is None and "not called" in str(report)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("flux", {"true_cfg_scale": 2.0}), ("sd3", {}), ("wan2.1", {}), ("cogvideox", {})],
    ids=["separate", "batched", "separate-video", "batched-video"],
)
def test_guidance_does_not_count_as_steps(tiny_pipelines, watched, name, guidance):
    tiny = tiny_pipelines.BUILDERS[name]()
    if guidance:
        guidance["negative_prompt_embeds"] = tiny.arguments["prompt_embeds"] * 0.5
        guidance["negative_pooled_prompt_embeds"] = tiny.arguments["pooled_prompt_embeds"]
    set_attn_processor(tiny.pipe, watched)
    tiny.sample(num_inference_steps=3, **guidance)
    assert {call.step for call in watched.calls} == {0, 1, 2}


def test_scheduled_steps_and_layers_run_the_stock_processor(flux, watched_class):
    method = watched_class(dense_steps=1, dense_layers=(0, 3))
    stock = flux.sample(num_inference_steps=3)
    attachment = set_attn_processor(flux.pipe, method)
    assert torch.equal(flux.sample(num_inference_steps=3), stock)
    assert {(call.step, call.layer) for call in method.calls} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    report = attachment.report()
    assert report.denoisers[0].dense_steps == {0: "dense_steps=1"}
    assert report.layers[0].dense_calls == {"dense_steps=1": 1, "dense_layers=(0, 3)": 2}
    assert report.layers[1].dense_calls == {"dense_steps=1": 1}
    assert "dense steps 0: dense_steps=1" in str(report)


# Company


@pytest.mark.parametrize("name", ["flux", "wan2.1"])
def test_first_block_cache_and_a_method_live_together(tiny_pipelines, watched, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    model = tiny.pipe.transformer
    set_attn_processor(tiny.pipe, watched)
    without = tiny.sample(num_inference_steps=4)
    calls = len(watched.calls)
    watched.calls.clear()

    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    tiny.sample(num_inference_steps=4)
    assert 0 < len(watched.calls) < calls
    assert {call.step for call in watched.calls} == {0, 1, 2, 3}

    model.disable_cache()
    watched.calls.clear()
    assert torch.equal(tiny.sample(num_inference_steps=4), without)
    assert len(watched.calls) == calls


def test_saving_an_attached_pipeline_writes_a_stock_one(flux, tmp_path):
    flux.pipe.save_pretrained(tmp_path / "stock")
    set_attn_processor(flux.pipe, SPARSE)
    flux.pipe.save_pretrained(tmp_path / "attached")
    files = {path.relative_to(tmp_path / "stock") for path in (tmp_path / "stock").rglob("*")}
    for file in files:
        one, other = tmp_path / "stock" / file, tmp_path / "attached" / file
        assert one.is_dir() or one.read_bytes() == other.read_bytes()
    assert len(list((tmp_path / "attached").rglob("*"))) == len(files)

    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path / "attached", **encoders)
    assert is_stock(loaded.transformer)
    restore_attn_processor(flux.pipe)
    stock = flux.sample()
    flux.pipe = loaded
    loaded.set_progress_bar_config(disable=True)
    # Loaded weights lie at other addresses, which alone can change the last bit.
    torch.testing.assert_close(flux.sample(), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep copy", "pickle"],
)
def test_a_copied_model_has_a_method_of_its_own(flux, duplicate):
    stock = flux.sample()
    attachment = set_attn_processor(flux.pipe, SPARSE)
    sparse = flux.sample()
    original = flux.pipe.transformer

    flux.pipe.transformer = duplicate(original)
    attachment.reset()
    assert torch.equal(flux.sample(), sparse)
    assert attachment.report().density is None
    restore_attn_processor(flux.pipe)
    assert is_stock(flux.pipe.transformer)
    assert torch.equal(flux.sample(), stock)

    flux.pipe.transformer = original
    assert torch.equal(flux.sample(), sparse)


def test_sequential_offload_hooks_do_not_hide_the_layout(flux, watched):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Aligning(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return args, kwargs

    add_hook_to_module(flux.pipe.transformer, Aligning())
    set_attn_processor(flux.pipe, watched)
    flux.sample()
    assert {call.layout for call in watched.calls} == flux.layouts


@pytest.mark.slow
def test_compiled_models_give_the_same_result(flux):
    set_attn_processor(flux.pipe, SPARSE)
    eager = flux.sample()
    flux.pipe.transformer.compile(backend="eager")
    compiled = flux.sample()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
