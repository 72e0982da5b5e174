"""Pipelines of noise: a schedule without a shift."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_models.base import built, noise

from tiny_image_pipelines import autoencoders
from tiny_image_pipelines.base import (
    Builder,
    TinyImagePipeline,
    assembled,
    denoiser,
    prompts,
)  # fmt: skip


def cogview3() -> TinyImagePipeline:
    """CogView3-Plus: CFG in one batch."""
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipe = assembled(
        diffusers.CogView3PlusPipeline, scheduler, vae=autoencoders.kl(),
        transformer=denoiser("CogView3PlusTransformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 16))


def hunyuan_dit() -> TinyImagePipeline:
    """HunyuanDiT: two texts, a scheduler that draws noise at each step."""
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    pipe = assembled(
        diffusers.HunyuanDiTPipeline, scheduler, vae=autoencoders.kl(),
        transformer=denoiser("HunyuanDiT2DModel"), requires_safety_checker=False,
    )  # fmt: skip
    told: dict[str, Any] = prompts(4, 8, mask="prompt_attention_mask")
    told |= {f"{name}_2": noise(1, 5, 8, seed=5) for name in list(told) if "embeds" in name}
    told |= {f"{name}_2": torch.ones(1, 5) for name in list(told) if name.endswith("mask")}
    return TinyImagePipeline(pipe, told)


def kolors() -> TinyImagePipeline:
    """Kolors: a U-Net with attention below its top level."""
    unet = built(
        diffusers.UNet2DConditionModel, in_channels=4, out_channels=4, sample_size=16,
        block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=2, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        encoder_hid_dim=12, encoder_hid_dim_type="text_proj", use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    pipe = assembled(
        diffusers.KolorsPipeline, diffusers.EulerDiscreteScheduler(), vae=autoencoders.kl(),
        unet=unet,
    )  # fmt: skip
    told = prompts(6, 12) | {
        "pooled_prompt_embeds": noise(1, 16, seed=4),
        "negative_pooled_prompt_embeds": noise(1, 16, seed=5),
    }
    return TinyImagePipeline(pipe, told)


def pixart(pipeline_class: Any) -> TinyImagePipeline:
    """PixArt: CFG in one batch, cross-attended text, two outputs for each element."""
    pipe = assembled(
        pipeline_class, diffusers.DPMSolverMultistepScheduler(), vae=autoencoders.kl(),
        transformer=denoiser("PixArtTransformer2DModel"),
    )  # fmt: skip
    told = prompts(6, 16, mask="prompt_attention_mask")
    return TinyImagePipeline(pipe, {**told, "negative_prompt": None})


BUILDERS: dict[str, Builder] = {
    "CogView3PlusPipeline": cogview3,
    "HunyuanDiTPipeline": hunyuan_dit,
    "KolorsPipeline": kolors,
    "PixArtAlphaPipeline": lambda: pixart(diffusers.PixArtAlphaPipeline),
    "PixArtSigmaPipeline": lambda: pixart(diffusers.PixArtSigmaPipeline),
}
