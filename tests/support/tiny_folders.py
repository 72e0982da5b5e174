"""Whole tiny stock pipelines, text encoders and tokenizers too, written to folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tiny_autoencoders as vaes
import tiny_clips as clips
import tiny_pipelines as pipelines
import tiny_texts as texts
import transformers
from tiny_models import MODELS
from tiny_models.base import built

Flow = diffusers.FlowMatchEulerDiscreteScheduler
NATIVE_SIDE = 48
"""Side in pixels of the square that image models are taken to know."""


def _model(name: str) -> Any:
    return MODELS[name]().model


def _shifted(levels: int = 3) -> Any:
    """The image VAE of flow models, whose latents are moved too."""
    vae = pipelines.vae(4, levels)
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.4)
    return vae


def _dressed(tiny: pipelines.TinyPipeline, **parts: Any) -> Any:
    """A tiny pipeline with what it lacks."""
    return type(tiny.pipe)(**{**tiny.pipe.components, **parts})


def flux() -> Any:
    encoders = {**texts.clip(32), **texts.numbered(texts.t5(32), 2)}
    return _dressed(pipelines.flux(), vae=_shifted(), **encoders)


def sd3() -> Any:
    transformer = built(
        diffusers.SD3Transformer2DModel, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, sample_size=NATIVE_SIDE // 4,
        pos_embed_max_size=32, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=64,
    )  # fmt: skip
    encoders = {
        **texts.clip(16, 32), **texts.numbered(texts.clip(16, 32), 2),
        **texts.numbered(texts.t5(32), 3),
    }  # fmt: skip
    return _dressed(pipelines.sd3(), transformer=transformer, vae=_shifted(), **encoders)


def sdxl() -> Any:
    tiny = pipelines.sdxl()
    tiny.pipe.unet.register_to_config(sample_size=NATIVE_SIDE // 4)
    return _dressed(tiny, **texts.clip(8), **texts.numbered(texts.clip(8, 16), 2))


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        transformer=_model("ChromaTransformer2DModel"),
        vae=_shifted(),
        scheduler=Flow(),
        **texts.t5(32),
    )


def pixart_sigma() -> Any:
    transformer = _model("PixArtTransformer2DModel")
    transformer.register_to_config(sample_size=NATIVE_SIDE // 4)  # which tells the native size
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=pipelines.vae(4),
        scheduler=diffusers.DPMSolverMultistepScheduler(), **texts.t5(16),
    )  # fmt: skip


def auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        transformer=_model("AuraFlowTransformer2DModel"),
        vae=pipelines.vae(4),
        scheduler=Flow(),
        **texts.t5(32, transformers.UMT5EncoderModel),
    )


def z_image() -> Any:
    encoder = texts.decoder_only(transformers.Qwen3Model, texts.qwen_tokenizer(), 16)
    return diffusers.ZImagePipeline(
        transformer=_model("ZImageTransformer2DModel"),
        vae=_shifted(),
        scheduler=Flow(),
        **encoder,
    )


def lumina2() -> Any:
    transformer = built(
        diffusers.Lumina2Transformer2DModel, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=16, sample_size=12,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        vae=_shifted(levels=4),
        scheduler=Flow(),
        **texts.decoder_only(transformers.Gemma2Model, texts.gemma_tokenizer(), 16),
    )


def qwen() -> Any:
    return _dressed(pipelines.qwen(), vae=vaes.qwen(), **texts.qwen_vl(16))


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        transformer=_model("CogView4Transformer2DModel"),
        vae=pipelines.vae(4),
        scheduler=Flow(),
        **texts.decoder_only(transformers.GlmModel, texts.glm_tokenizer(), 16),
    )


def ltx() -> Any:
    return _dressed(pipelines.ltx(), vae=vaes.ltx(), **texts.t5(32))


def cogvideox() -> Any:
    return _dressed(pipelines.cogvideox(), vae=vaes.cogvideox(), **texts.t5(32))


def wan() -> Any:
    tiny = pipelines.wan21()
    tiny.pipe.transformer.register_to_config(_native_grid=(3, 3, 4))
    return _dressed(tiny, vae=vaes.wan(), **texts.t5(32, transformers.UMT5EncoderModel))


def skyreels_v2() -> Any:
    return diffusers.SkyReelsV2Pipeline(
        transformer=_model("SkyReelsV2Transformer3DModel"), vae=vaes.wan(),
        scheduler=pipelines.wan21().pipe.scheduler,
        **texts.t5(32, transformers.UMT5EncoderModel),
    )  # fmt: skip


def hunyuan_video() -> Any:
    llama = texts.decoder_only(transformers.LlamaModel, texts.llama_tokenizer(), 16)
    parts = llama | texts.numbered(texts.clip(8), 2)
    return _dressed(pipelines.hunyuan(), vae=vaes.hunyuan(), **parts)


def mochi() -> Any:
    transformer = built(
        diffusers.MochiTransformer3DModel, patch_size=2, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=16, time_embed_dim=8,
    )  # fmt: skip
    return diffusers.MochiPipeline(
        transformer=transformer,
        vae=vaes.mochi(),
        scheduler=Flow(),
        **texts.t5(16),
    )


def animatediff() -> Any:
    parts = clips.animatediff().pipe.components
    return diffusers.AnimateDiffPipeline(**{**parts, **texts.clip(16)})


def anyflow() -> Any:
    parts = clips.anyflow().pipe.components
    return diffusers.AnyFlowPipeline(**{**parts, **texts.t5(32, transformers.UMT5EncoderModel)})


IMAGES: dict[str, Callable[[], Any]] = {
    "FluxPipeline": flux,
    "StableDiffusion3Pipeline": sd3,
    "ChromaPipeline": chroma,
    "StableDiffusionXLPipeline": sdxl,
    "PixArtSigmaPipeline": pixart_sigma,
    "AuraFlowPipeline": auraflow,
    "ZImagePipeline": z_image,
    "Lumina2Pipeline": lumina2,
    "QwenImagePipeline": qwen,
    "CogView4Pipeline": cogview4,
}
VIDEOS: dict[str, Callable[[], Any]] = {
    "AnimateDiffPipeline": animatediff,
    "AnyFlowPipeline": anyflow,
    "LTXPipeline": ltx,
    "CogVideoXPipeline": cogvideox,
    "WanPipeline": wan,
    "SkyReelsV2Pipeline": skyreels_v2,
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
}


def write_folder(name: str, folder: Path) -> Path:
    """Writes the pipeline of a class as `save_pretrained` does."""
    (IMAGES | VIDEOS)[name]().save_pretrained(folder)
    return folder
