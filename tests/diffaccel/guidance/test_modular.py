"""The guider for modular pipelines, driven as those do."""

import pytest
import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from diffaccel import (
    FullAttn,
    HeadPerturbation,
    PermuteTokens,
    SkipLayers,
    set_attn_processor,
    set_guidance,
)
from diffaccel.guidance.modular import PerturbationGuider

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = HeadPerturbation(heads=((1, 0),), strength=0.7)


def call_of(tiny):
    """Arguments of the first call that a pipeline makes."""
    calls, model = [], next(iter(tiny.denoisers().values()))
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny.sample()
    handle.remove()
    return model, calls[0][1]


@torch.no_grad()
def guided(guider, model, kwargs, step=0, steps=4):
    """One step as a modular denoising loop takes it."""
    guider.set_state(step, steps, kwargs["timestep"])
    text = kwargs["encoder_hidden_states"]
    states = guider.prepare_inputs({"encoder_hidden_states": (text, text.flip(1))})
    for state in states:
        guider.prepare_models(model)
        changed = {**kwargs, "encoder_hidden_states": state.encoder_hidden_states}
        state.noise_pred = model(**changed)[0]
        guider.cleanup_models(model)
    return guider(states).pred, len(states)


@pytest.mark.parametrize("name", ["flux", "wan2.1", "qwen"])
@pytest.mark.parametrize("perturbation", [HEADS, SkipLayers((1,)), PermuteTokens((1,))], ids=repr)
def test_it_combines_three_predictions(tiny_pipelines, name, perturbation):
    model, kwargs = call_of(tiny_pipelines.BUILDERS[name]())
    options = {"guidance_scale": 4.0, "perturbation_scale": 2.0}
    both, calls = guided(PerturbationGuider(perturbation, **options), model, kwargs)
    assert calls == 3
    plain, calls = guided(
        PerturbationGuider(perturbation, **{**options, "perturbation_scale": 0.0}), model, kwargs
    )
    assert calls == 2
    alone, calls = guided(
        PerturbationGuider(perturbation, **{**options, "guidance_scale": 1.0}), model, kwargs
    )
    assert calls == 2
    with torch.no_grad():
        sound = model(**kwargs)[0]
    torch.testing.assert_close(both - plain, alone - sound, rtol=1e-4, atol=1e-5)
    assert (alone - sound).abs().max() > 1e-6
    assert all("forward" not in part.__dict__ for part in model.modules())


def test_it_equals_the_method_by_itself(tiny_pipelines):
    model, kwargs = call_of(tiny_pipelines.flux())
    guider = PerturbationGuider(HEADS, guidance_scale=1.0, perturbation_scale=2.0)
    got, _ = guided(guider, model, kwargs)
    with torch.no_grad():
        sound = model(**kwargs)[0]
        with set_attn_processor(model, HEADS, always=True):
            damaged = model(**kwargs)[0]
    torch.testing.assert_close(got, sound + 2.0 * (sound - damaged))
    with set_attn_processor(model, FullAttn()):
        assert torch.equal(guided(guider, model, kwargs)[0], got)


def test_windows_and_switches(tiny_pipelines):
    model, kwargs = call_of(tiny_pipelines.flux())
    guider = PerturbationGuider(HEADS, perturbation_stop=0.5)
    assert guided(guider, model, kwargs, step=1)[1] == 3
    assert guided(guider, model, kwargs, step=2)[1] == 2
    guider.disable()
    assert guided(guider, model, kwargs)[1] == 1


def test_it_travels_as_a_config(tmp_path):
    guider = PerturbationGuider(HEADS, perturbation_scale=1.5)
    guider.save_pretrained(tmp_path)
    again = PerturbationGuider.from_pretrained(tmp_path)
    assert again.perturbation == HEADS and again.perturbation_scale == 1.5
    assert isinstance(guider.new(guidance_scale=2.0), BaseGuidance)


def test_unknown_layers_are_refused(tiny_pipelines):
    model, kwargs = call_of(tiny_pipelines.flux())
    with pytest.raises(ValueError, match="layers must lie in 0 to 3"):
        guided(PerturbationGuider(SkipLayers((9,))), model, kwargs)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_modular_pipeline_gives_what_set_guidance_gives(tiny_pipelines, cfg):
    tiny = tiny_pipelines.wan21()
    noise = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    modular = WanCoreDenoiseStep().init_pipeline()
    guider = PerturbationGuider(HEADS, guidance_scale=cfg, perturbation_scale=2.0)
    parts = {"transformer": tiny.pipe.transformer, "scheduler": tiny.pipe.scheduler}
    modular.update_components(**parts, guider=guider)
    got = modular(**tiny.arguments, latents=noise, output="latents")
    plain = tiny.sample(guidance_scale=cfg, latents=noise)
    with set_guidance(tiny.pipe, HEADS, scale=2.0):
        expected = tiny.sample(guidance_scale=cfg, latents=noise)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
