"""Stock pipelines of images around the tiny models: their steps, prompts and layouts are known."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import MODELS
from tiny_models.base import lengths, noise

from diffaccel import HeadPerturbation, SparseAttn, set_attn_processor, set_guidance
from diffaccel.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")
Flow = diffusers.FlowMatchEulerDiscreteScheduler
STEPS = 3
HALF = SparseAttn(keep=0.5, block=16, dense_steps=1, dense_layers=())
NUMBERS = ("", "_2", "_3", "_4")
WITHOUT = ("vae", "processor", "safety_checker", "feature_extractor", "movq", "vqvae")


@dataclass
class Case:
    """A pipeline class around a tiny model.

    Args:
        kind: Of the pipeline.
        scheduler: Its scheduler.
        arguments: Of a call.
        calls: Model calls in a step.
        changed: Text tokens of the latest call, where those of the tiny model are others.
        component: Name of the denoiser.
    """

    kind: type
    scheduler: Any
    arguments: dict[str, Any]
    calls: int = 1
    changed: int | None = None
    component: str = "transformer"


def texts(width: int, mask: str = "prompt_attention_mask", length: int = 6) -> dict[str, Any]:
    """A prompt and a negative one; masks of 5 and 2 tokens where they have a name."""
    call = {
        "prompt_embeds": noise(1, length, width, seed=2),
        "negative_prompt_embeds": noise(1, length, width, seed=3),
    }
    if mask:
        call |= {mask: lengths(length, 5).long(), f"negative_{mask}": lengths(length, 2).long()}
    return call


SIZE = {"height": 80, "width": 208}
CASES = {
    "ZImageTransformer2DModel": lambda: Case(
        diffusers.ZImagePipeline, Flow(),
        {"prompt_embeds": [noise(40, 16)], "negative_prompt_embeds": [noise(6, 16)], **SIZE},
    ),
    "Lumina2Transformer2DModel": lambda: Case(
        diffusers.Lumina2Pipeline, Flow(), texts(16) | SIZE, calls=2, changed=2
    ),
    "CogView4Transformer2DModel": lambda: Case(
        diffusers.CogView4Pipeline, Flow(), texts(16, "") | SIZE, calls=2
    ),
    "CogView3PlusTransformer2DModel": lambda: Case(
        diffusers.CogView3PlusPipeline, diffusers.CogVideoXDDIMScheduler(), texts(16, "") | SIZE
    ),
    "PRXTransformer2DModel": lambda: Case(
        diffusers.PRXPipeline, Flow(), texts(16) | SIZE | {"use_resolution_binning": False}
    ),
    "NucleusMoEImageTransformer2DModel": lambda: Case(
        diffusers.NucleusMoEImagePipeline, Flow(),
        texts(12, "prompt_embeds_mask") | {"height": 112, "width": 208}, calls=2,
    ),
    "PixArtTransformer2DModel": lambda: Case(
        diffusers.PixArtAlphaPipeline, diffusers.DPMSolverMultistepScheduler(),
        texts(16) | SIZE | {"negative_prompt": None, "use_resolution_binning": False},
    ),
    "LuminaNextDiT2DModel": lambda: Case(diffusers.LuminaPipeline, Flow(), texts(12) | SIZE),
    "Kandinsky3UNet": lambda: Case(
        diffusers.Kandinsky3Pipeline, diffusers.DDPMScheduler(),
        texts(16, "attention_mask") | {"height": 256, "width": 384}, component="unet",
    ),
}  # fmt: skip


PIXART = "PixArtTransformer2DModel"
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "Kandinsky3UNet" else name
    for name in CASES
]


def built(name: str) -> tuple[Any, Any, Case]:
    """Returns a tiny model, a pipeline around it, and how it is called."""
    tiny, case = MODELS[name](), CASES[name]()
    accepted = inspect.signature(case.kind.__init__).parameters
    parts = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in NUMBERS]
    missing = {part: None for part in (*parts, *WITHOUT) if part in accepted}
    pipe: Any = case.kind(**missing, scheduler=case.scheduler, **{case.component: tiny.model})
    pipe.set_progress_bar_config(disable=True)
    return tiny, pipe, case


def sampled(pipe: Any, case: Case) -> torch.Tensor:
    return pipe(
        **case.arguments, num_inference_steps=STEPS, output_type="latent", return_dict=False,
        generator=torch.Generator().manual_seed(0), guidance_scale=3.0,
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_dense_and_the_others_know_their_tokens(name):
    tiny, pipe, case = built(name)
    stock = sampled(pipe, case)
    with set_attn_processor(pipe, HALF, always=True) as attachment:
        output = sampled(pipe, case)
        assert torch.equal(sampled(pipe, case), output)
        report = attachment.report().denoisers[0]
    assert report.steps == STEPS and not torch.equal(output, stock)
    for layer in report.layers:
        assert layer.dense_calls == {"dense_steps=1": case.calls}
        assert layer.sparse_calls == case.calls * (STEPS - 1)
        expected = tiny._layout(layer.name, tiny.layouts)
        assert layer.layout.grid == expected.grid
        if layer.kind == "joint":
            kinds = [segment.kind for segment in expected.segments]
            assert [segment.kind for segment in layer.layout.segments] == kinds
            assert layer.layout.text_length == (case.changed or expected.text_length)
    assert torch.equal(sampled(pipe, case), stock)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("ZImageTransformer2DModel", PIXART)]
)
def test_the_damaged_forward_gets_the_prompt_and_not_the_negative_one(name):
    tiny, pipe, case = built(name)
    texts = []

    def seen(module, args, kwargs):
        texts.append(kwargs["encoder_hidden_states"])

    pag = HeadPerturbation(layers=(len(tiny.layer_names()) - 1,))
    with set_guidance(pipe, pag, scale=2.0) as guidance:
        handle = tiny.model.register_forward_pre_hook(seen, with_kwargs=True)
        sampled(pipe, case)
        assert guidance.report().guided_steps == STEPS
    handle.remove()
    assert len(texts) == STEPS * (case.calls + 1)  # the second call of a step is damaged
    for text in texts[1 :: case.calls + 1]:
        torch.testing.assert_close(text, case.arguments["prompt_embeds"][:, : text.shape[1]])


@pytest.mark.parametrize("name", [PIXART])
def test_a_pipeline_that_tells_no_rows_is_refused(name):
    _, pipe, _ = built(name)
    with pytest.raises(ModelError, match="which rows of a batch"):
        set_guidance(pipe, HeadPerturbation(layers=(0,)))
