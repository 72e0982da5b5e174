"""Whole tiny stock pipelines of clips with random weights; prompts come as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tiny_autoencoders as vaes
import tiny_pipelines as pipelines
import torch
from diffusers.guiders import ClassifierFreeGuidance
from tiny_image_pipelines.base import assembled, denoiser, prompts
from tiny_models.base import built, noise

Flow = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass
class TinyClip:
    """A pipeline with random weights, and how it is called.

    Args:
        pipe: The pipeline.
        told: What its call needs, but for size, length, steps and generator.
    """

    pipe: Any
    told: dict[str, Any] = field(default_factory=dict)


def _named(name: str, vae: Any) -> TinyClip:
    """One of `tiny_pipelines`, with an autoencoder."""
    tiny = pipelines.BUILDERS[name]()
    pipe = type(tiny.pipe)(**{**tiny.pipe.components, "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    told = {key: x for key, x in tiny.arguments.items() if "embeds" in key or "mask" in key}
    return TinyClip(pipe, told)


def hunyuan_video() -> TinyClip:
    return _named("hunyuan", vaes.hunyuan())


def cogvideox() -> TinyClip:
    return _named("cogvideox", vaes.cogvideox())


def ltx() -> TinyClip:
    return _named("ltx", vaes.ltx())


def hunyuan_video_15() -> TinyClip:
    """Guided by a component, which has its scale; a picture's features stand in as zeros."""
    transformer = type(model := denoiser("HunyuanVideo15Transformer3DModel"))
    pipe = assembled(
        diffusers.HunyuanVideo15Pipeline, Flow(shift=5.0),
        transformer=built(transformer, **dict(model.config) | {"patch_size": 1}),
        vae=vaes.hunyuan_15(),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 7
    told = prompts(6, 16, mask="prompt_embeds_mask")
    second = prompts(5, 8, mask="prompt_embeds_mask")
    return TinyClip(pipe, told | {f"{name}_2": value for name, value in second.items()})


def kandinsky5() -> TinyClip:
    """Channels of a given first frame are there and empty, as in the published models."""
    pipe = assembled(
        diffusers.Kandinsky5T2VPipeline, Flow(shift=5.0),
        transformer=denoiser("Kandinsky5Transformer3DModel"), vae=vaes.hunyuan(),
    )  # fmt: skip
    told = {}
    for sign, seed in (("", 2), ("negative_", 3)):
        told |= {
            f"{sign}prompt_embeds_qwen": noise(1, 6, 16, seed=seed),
            f"{sign}prompt_embeds_clip": noise(1, 8, seed=seed),
            f"{sign}prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        }
    return TinyClip(pipe, told)


def anyflow() -> TinyClip:
    pipe = assembled(
        diffusers.AnyFlowPipeline, diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=denoiser("AnyFlowTransformer3DModel"), vae=vaes.wan(),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 32))


def motif() -> TinyClip:
    """Guided by a component, which has its scale."""
    pipe = assembled(
        diffusers.MotifVideoPipeline, Flow(shift=5.0),
        transformer=denoiser("MotifVideoTransformer3DModel"), vae=vaes.wan(4),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 16, mask="prompt_attention_mask"))


def easyanimate() -> TinyClip:
    pipe = assembled(
        diffusers.EasyAnimatePipeline, Flow(shift=5.0),
        transformer=denoiser("EasyAnimateTransformer3DModel"), vae=vaes.magvit(),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 16, mask="prompt_attention_mask"))


def animatediff() -> TinyClip:
    pipe = assembled(
        diffusers.AnimateDiffPipeline, diffusers.DDIMScheduler(clip_sample=False),
        unet=denoiser("UNetMotionModel"), vae=pipelines.vae(4, levels=4),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 16))


def skyreels_v2() -> TinyClip:
    pipe = assembled(
        diffusers.SkyReelsV2Pipeline, pipelines.wan21().pipe.scheduler,
        transformer=denoiser("SkyReelsV2Transformer3DModel"), vae=vaes.wan(),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 32))


def mochi() -> TinyClip:
    transformer = built(
        diffusers.MochiTransformer3DModel, patch_size=2, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=16, time_embed_dim=8,
    )  # fmt: skip
    pipe = assembled(diffusers.MochiPipeline, Flow(), transformer=transformer, vae=vaes.mochi())
    return TinyClip(pipe, prompts(6, 16, mask="prompt_attention_mask", dtype=torch.bool))


CLIPS: dict[str, Callable[[], TinyClip]] = {
    "AnimateDiffPipeline": animatediff,
    "AnyFlowPipeline": anyflow,
    "CogVideoXPipeline": cogvideox,
    "EasyAnimatePipeline": easyanimate,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "HunyuanVideoPipeline": hunyuan_video,
    "Kandinsky5T2VPipeline": kandinsky5,
    "LTXPipeline": ltx,
    "MochiPipeline": mochi,
    "MotifVideoPipeline": motif,
    "SkyReelsV2Pipeline": skyreels_v2,
}
