"""What pipelines do around a method: guide, call back, switch backends, save, convert, split."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from diffaccel import FullAttn, SparseAttn, restore_attn_processor, set_attn_processor

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
PAG = {
    "sd15": (diffusers.StableDiffusionPAGPipeline, "mid"),
    "sdxl": (diffusers.StableDiffusionXLPAGPipeline, "mid"),
    "sd3": (diffusers.StableDiffusion3PAGPipeline, "blocks.1"),
}


def of_class(tiny, pipeline_class, **options):
    """Gives a tiny pipeline another class, with the same components."""
    accepted = inspect.signature(pipeline_class.__init__).parameters
    parts = {name: part for name, part in tiny.pipe.components.items() if name in accepted}
    if "requires_safety_checker" in accepted:
        options["requires_safety_checker"] = False
    if "add_watermarker" in accepted:
        options["add_watermarker"] = False
    tiny.pipe = pipeline_class(**parts, **options)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


@pytest.mark.parametrize("name", PAG)
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 0.0}, {"pag_adaptive_scale": 0.9}])
def test_layers_of_perturbed_attention_have_their_reason(tiny_pipelines, name, options):
    pipeline_class, layers = PAG[name]
    tiny = of_class(tiny_pipelines.BUILDERS[name](), pipeline_class, pag_applied_layers=layers)
    options = {"pag_scale": 3.0, **options}
    stock = tiny.sample(**options)
    set_attn_processor(tiny.pipe, FullAttn())
    assert torch.equal(tiny.sample(**options), stock)
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no longer serves")
        tiny.sample(**options)
    guided = [layer for layer in attachment.report().layers if not layer.sparse_calls]
    assert guided and len(guided) < len(attachment.report().layers)
    for layer in guided:
        ((reason, calls),) = layer.dense_calls.items()
        assert calls == tiny_pipelines.STEPS and "guides at this layer" in reason
    tiny.sample(pag_scale=0.0)
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    attachment.remove()
    assert torch.equal(tiny.sample(**options), stock)


def part(**options):
    return LayerSkipConfig(indices=[1], fqn="blocks", **options)


BLOCK = part(skip_attention=True, skip_ff=True)
SCORES = part(skip_attention=False, skip_attention_scores=True, skip_ff=False)


def everywhere(guider, name, **options):
    """A guider that acts in all steps."""
    window = {f"{name}_start": 0.0, f"{name}_stop": 1.0}
    return lambda: guider(4.0, **window, **options)


GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(4.0),
    "off": lambda: ClassifierFreeGuidance(1.0),
    "zero star": lambda: ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=0),
    "projected": lambda: AdaptiveProjectedGuidance(4.0),
    "tangential": lambda: TangentialClassifierFreeGuidance(4.0),
    "auto": lambda: AutoGuidance(4.0, auto_guidance_config=BLOCK),
    "skip": everywhere(
        SkipLayerGuidance, "skip_layer_guidance", skip_layer_guidance_scale=2.0,
        skip_layer_config=BLOCK,
    ),
    "energy": everywhere(
        SmoothedEnergyGuidance, "seg_guidance", seg_guidance_scale=2.0,
        seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[1], fqn="blocks"),
    ),
    "perturbed": everywhere(
        PerturbedAttentionGuidance, "perturbed_guidance", perturbed_guidance_scale=2.0,
        perturbed_guidance_config=SCORES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_of_modular_pipelines(tiny_pipelines, name):
    tiny = tiny_pipelines.wan21()
    noise = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    pipe = WanCoreDenoiseStep().init_pipeline()
    parts = {"transformer": tiny.pipe.transformer, "scheduler": tiny.pipe.scheduler}
    pipe.update_components(**parts, guider=GUIDERS[name]())
    pipe.set_progress_bar_config(disable=True)

    def sample():
        with torch.no_grad():
            return pipe(**tiny.arguments, latents=noise, output="latents")

    if name == "perturbed":  # diffusers does not know the processors of Wan, with us or without
        for _ in range(2):
            with pytest.raises(ValueError, match="WanAttnProcessor.*not registered"):
                sample()
            pipe.set_attn_processor(FullAttn())
        return
    stock = sample()
    pipe.set_attn_processor(FullAttn())
    assert torch.equal(sample(), stock)
    attachment = pipe.set_attn_processor(METHOD, always=True)
    sparse = sample()
    assert not torch.equal(sparse, stock) and torch.equal(sample(), sparse)
    (denoiser,) = attachment.report().denoisers
    assert denoiser.steps == tiny_pipelines.STEPS
    assert all(layer.sparse_calls and not layer.dense_calls for layer in denoiser.layers)
    attachment.remove()
    assert torch.equal(sample(), stock)


def change_latents(pipe, step, timestep, inputs):
    return {"latents": inputs["latents"] * 0.9}


def change_prompt(pipe, step, timestep, inputs):
    return {"prompt_embeds": inputs["prompt_embeds"] * 0.5}


def end_guidance(pipe, step, timestep, inputs):
    if step == 1:
        pipe._guidance_scale = 0.0
        return {name: x[len(x) // 2 :] for name, x in inputs.items() if name != "latents"}
    return {}


def shorten_prompt(pipe, step, timestep, inputs):
    return {"prompt_embeds": inputs["prompt_embeds"][:, :5]}


def interrupt(pipe, step, timestep, inputs):
    pipe._interrupt = step == 1
    return {}


TEXT = ("prompt_embeds",)
SDXL = ("prompt_embeds", "add_text_embeds", "add_time_ids")
CALLBACKS = [
    ("flux", change_latents, ("latents",), 4),
    ("wan2.1", change_latents, ("latents",), 4),
    ("sd15", change_prompt, TEXT, 4),
    ("wan2.1", change_prompt, TEXT, 4),
    ("sd15", end_guidance, TEXT, 4),
    ("sdxl", end_guidance, SDXL, 4),
    ("sd15", shorten_prompt, TEXT, 4),
    ("flux", interrupt, ("latents",), 2),
    ("sdxl", interrupt, ("latents",), 2),
    ("wan2.1", interrupt, ("latents",), 2),
]


@pytest.mark.parametrize(
    ("name", "callback", "inputs", "steps"),
    CALLBACKS,
    ids=[f"{name}-{callback.__name__}" for name, callback, *_ in CALLBACKS],
)
def test_callbacks_change_a_run(tiny_pipelines, name, callback, inputs, steps):
    tiny = tiny_pipelines.BUILDERS[name]()
    options = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": list(inputs),
        "num_inference_steps": 4,
    }
    stock, plain = tiny.sample(**options), tiny.sample(num_inference_steps=4)
    assert not torch.equal(stock, plain)
    set_attn_processor(tiny.pipe, FullAttn())
    assert torch.equal(tiny.sample(**options), stock)
    assert torch.equal(tiny.sample(num_inference_steps=4), plain)
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ran dense")
        sparse = tiny.sample(**options)
    assert not torch.equal(sparse, stock)
    assert all(part.steps == steps for part in attachment.report().denoisers)
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    tiny.sample(num_inference_steps=3)
    assert all(part.steps == 3 for part in attachment.report().denoisers)


@pytest.fixture
def native_backend():
    """Puts back what `set_attention_backend` of diffusers changes for the whole process."""
    registry = _AttentionBackendRegistry
    before = registry._active_backend
    yield lambda: registry._active_backend
    registry._active_backend = before


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        "sd3",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("wan2.1", "qwen", "sdxl")),
    ],
)
@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_backends_are_those_of_the_user(tiny_pipelines, native_backend, name, backend):
    tiny = tiny_pipelines.BUILDERS[name]()
    models = tiny.denoisers().values()
    plain, usual = tiny.sample(), native_backend()
    with attention_backend(backend):
        whole = tiny.sample()
        with set_attn_processor(tiny.pipe, FullAttn()):
            assert torch.equal(tiny.sample(), whole)
            assert native_backend() == AttentionBackendName(backend)
    assert native_backend() == usual
    for model in models:
        model.set_attention_backend(backend)
    chosen, stock = native_backend(), tiny.sample()
    with set_attn_processor(tiny.pipe, FullAttn()):
        assert torch.equal(tiny.sample(), stock)
        assert native_backend() == chosen
    _AttentionBackendRegistry._active_backend = usual
    for model in models:
        model.reset_attention_backend()
    assert torch.equal(tiny.sample(), plain)
    set_attn_processor(tiny.pipe, FullAttn())
    for model in models:
        model.set_attention_backend(backend)
    assert torch.equal(tiny.sample(), stock)
    restore_attn_processor(tiny.pipe)  # the choice outlives the method
    assert torch.equal(tiny.sample(), stock)


@pytest.mark.parametrize("name", ["sd3", "wan2.2", "sdxl"])
def test_an_attached_pipeline_is_saved_as_a_stock_one(tiny_pipelines, tmp_path, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    tiny.pipe.save_pretrained(tmp_path / "stock")
    set_attn_processor(tiny.pipe, METHOD)
    tiny.pipe.save_pretrained(tmp_path / "attached")
    stock, attached = (
        {file.relative_to(tmp_path / kind): file.read_bytes() for file in folder.rglob("*.*")}
        for kind in ("stock", "attached")
        for folder in (tmp_path / kind,)
    )
    assert attached == stock
    for part, model in tiny.denoisers().items():
        model.save_pretrained(tmp_path / part)
        again = type(model).from_pretrained(tmp_path / part)
        assert not again._forward_pre_hooks
        for module in again.modules():
            if hasattr(module, "processor"):
                assert type(module.processor).__module__.startswith("diffusers.")


@pytest.mark.parametrize("name", ["flux", "wan2.2", "sdxl"])
def test_a_pipeline_changes_its_dtype_while_attached(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()

    def sample(dtype):
        tiny.pipe.to(dtype)
        embeds = {key: x.to(dtype) for key, x in tiny.arguments.items() if key.endswith("_embeds")}
        return tiny.sample(**embeds)

    stock = [sample(dtype) for dtype in (torch.bfloat16, torch.float32)]
    set_attn_processor(tiny.pipe, FullAttn())
    for dtype, expected in zip((torch.bfloat16, torch.float32), stock, strict=True):
        assert torch.equal(sample(dtype), expected)
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    assert sample(torch.bfloat16).isfinite().all()
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    restore_attn_processor(tiny.pipe)
    assert torch.equal(sample(torch.bfloat16), stock[0])


def test_a_pipeline_made_from_another_shares_the_method(tiny_pipelines):
    tiny, other = tiny_pipelines.sdxl(), tiny_pipelines.sdxl()
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    expected = tiny.sample()
    encoders = {"text_encoder": None, "text_encoder_2": None}
    other.pipe = type(tiny.pipe).from_pipe(tiny.pipe, add_watermarker=False, **encoders)
    other.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(other.sample(), expected)
    restore_attn_processor(other.pipe)
    assert all("not called" not in str(layer) for layer in attachment.report().layers)
    attachment.remove()
    assert torch.equal(tiny.sample(), tiny_pipelines.sdxl().sample())


@pytest.mark.slow
def test_processes_of_accelerate_make_the_pictures_of_one(tiny_pipelines, tmp_path):
    script = Path(__file__).parent / "accelerated_ranks.py"
    # what `accelerate launch` calls; on CPUs it would start one process, or ask for MPI
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tiny = tiny_pipelines.flux()
    set_attn_processor(tiny.pipe, METHOD, always=True)
    ranks = set()
    for seed in (1, 2, 3):
        rank, picture = torch.load(tmp_path / f"{seed}.pt")
        ranks.add(rank)
        assert torch.equal(picture, tiny.sample(seed=seed))
    assert ranks == {0, 1}
