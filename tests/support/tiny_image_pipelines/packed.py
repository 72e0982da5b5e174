"""Flow pipelines that hold their latents as tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_models.base import built, noise

from tiny_image_pipelines import autoencoders
from tiny_image_pipelines.base import (
    Builder,
    Flow,
    TinyImagePipeline,
    assembled,
    denoiser,
    prompts,
)  # fmt: skip


def bria() -> TinyImagePipeline:
    """Bria 3.2: CFG in one batch."""
    pipe = assembled(
        diffusers.BriaPipeline, Flow(use_dynamic_shifting=True), vae=autoencoders.kl(),
        transformer=denoiser("BriaTransformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 32))


def fibo() -> TinyImagePipeline:
    """Fibo: takes text alone, so that its encoding is replaced; CFG in one batch."""
    pipe: Any = assembled(
        diffusers.BriaFiboPipeline, Flow(use_dynamic_shifting=True), vae=autoencoders.wan(16),
        transformer=denoiser("BriaFiboTransformer2DModel"),
    )  # fmt: skip
    layers = [[noise(1, 6, 16, seed=first + seed) for seed in range(4)] for first in (6, 16)]
    pipe.encode_prompt = lambda **_: (
        noise(1, 6, 32, seed=2), noise(1, 6, 32, seed=3), torch.zeros(1, 6, 3),
        torch.ones(1, 6), torch.ones(1, 6), *layers,
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompt="a cat")


def chroma() -> TinyImagePipeline:
    """Chroma: CFG in two calls, text behind a mask."""
    pipe = assembled(
        diffusers.ChromaPipeline, Flow(), vae=autoencoders.kl(),
        transformer=denoiser("ChromaTransformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 32, mask="prompt_attention_mask", dtype=torch.float))


def flux2() -> TinyImagePipeline:
    """FLUX.2: its guidance is embedded."""
    pipe = assembled(
        diffusers.Flux2Pipeline, Flow(use_dynamic_shifting=True), vae=autoencoders.flux2(),
        transformer=denoiser("Flux2Transformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, {"prompt_embeds": noise(1, 6, 32, seed=2)})


def klein() -> TinyImagePipeline:
    """FLUX.2 Klein: CFG in two calls."""
    pipe = assembled(
        diffusers.Flux2KleinPipeline, Flow(use_dynamic_shifting=True), vae=autoencoders.flux2(),
        transformer=denoiser("Flux2Transformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 32))


def krea2() -> TinyImagePipeline:
    """Krea 2: CFG in two calls, features of three layers for each word."""
    pipe = assembled(
        diffusers.Krea2Pipeline, Flow(use_dynamic_shifting=True), vae=autoencoders.qwen(4),
        transformer=denoiser("Krea2Transformer2DModel"),
    )  # fmt: skip
    told = prompts(6, 3, 16, mask="prompt_embeds_mask", dtype=torch.bool)
    return TinyImagePipeline(pipe, told)


def longcat() -> TinyImagePipeline:
    """LongCat-Image: needs text beside embeddings, so that its encoding is replaced."""
    model = built(
        diffusers.LongCatImageTransformer2DModel, in_channels=64, num_layers=2,
        num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    pipe: Any = assembled(
        diffusers.LongCatImagePipeline, Flow(use_dynamic_shifting=True),
        vae=autoencoders.kl(16), transformer=model,
    )  # fmt: skip
    pipe._encode_prompt = lambda prompt: noise(1, 6, 32, seed=len(prompt[0]))
    return TinyImagePipeline(pipe, prompt="a cat")


def nucleus() -> TinyImagePipeline:
    """Nucleus: CFG in two calls."""
    pipe = assembled(
        diffusers.NucleusMoEImagePipeline, Flow(use_dynamic_shifting=True),
        vae=autoencoders.qwen(2), transformer=denoiser("NucleusMoEImageTransformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 12, mask="prompt_embeds_mask"))


def ovis() -> TinyImagePipeline:
    """Ovis-Image: CFG in two calls."""
    pipe = assembled(
        diffusers.OvisImagePipeline, Flow(use_dynamic_shifting=True), vae=autoencoders.kl(),
        transformer=denoiser("OvisImageTransformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 32) | {"negative_prompt": None})


class Processor:
    """What Qwen-Image 2.1 asks of its processor when it is put together: two numbers."""

    @property
    def tokenizer(self) -> Processor:
        """Itself."""
        return self

    def encode(self, _text: str) -> list[int]:
        """The number of a word."""
        return [7]

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        """The numbers of a message."""
        return [[1]]


def qwen21() -> TinyImagePipeline:
    """Qwen-Image 2.1: tokens are single elements, no guidance by default."""
    pipe = assembled(
        diffusers.QwenImage21Pipeline, Flow(use_dynamic_shifting=True),
        vae=autoencoders.qwen21(8), processor=Processor(),
        transformer=denoiser("QwenImage21Transformer2DModel"),
    )  # fmt: skip
    told = {"prompt_embeds": noise(1, 6, 12, seed=2), "prompt_embeds_mask": torch.ones(1, 6)}
    return TinyImagePipeline(pipe, told)


BUILDERS: dict[str, Builder] = {
    "BriaPipeline": bria,
    "BriaFiboPipeline": fibo,
    "ChromaPipeline": chroma,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": klein,
    "Krea2Pipeline": krea2,
    "LongCatImagePipeline": longcat,
    "NucleusMoEImagePipeline": nucleus,
    "OvisImagePipeline": ovis,
    "QwenImage21Pipeline": qwen21,
}
