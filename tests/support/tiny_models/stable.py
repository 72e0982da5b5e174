"""Stable Diffusion: the U-Nets and the transformer of version 3."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def sd3() -> TinyModel:
    """SD 3.5: image first, then text; the first block has a second, image-only attention."""
    model = built(
        diffusers.SD3Transformer2DModel, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, sample_size=32, pos_embed_max_size=32,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        patch_size=2, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "pooled_projections": noise(2, 64, seed=3), "timestep": noise(2, seed=4),
        },
        layouts={
            r"transformer_blocks\.\d\.attn": TokenLayout.image(5, 13, text_after=6),
            r"transformer_blocks\.0\.attn2": TokenLayout.image(5, 13),
        },
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=6,
    )  # fmt: skip


def unet() -> TinyModel:
    """SD 1.5: two levels of attention, an odd height."""
    model = built(
        diffusers.UNet2DConditionModel, in_channels=4, out_channels=4, sample_size=16,
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D",) * 2,
        layers_per_block=1, up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=2,
        cross_attention_dim=16, norm_num_groups=2,
    )  # fmt: skip
    top, deep = (TokenLayout.image(*size) for size in ((9, 14), (5, 7)))
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 9, 14), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
        },
        layouts={
            r"(down_blocks\.0|up_blocks\.1)\..+\.attn1": top,
            r"(down_blocks\.1|mid_block|up_blocks\.0)\..+\.attn1": deep,
        },
        grid=(1, 9, 14), latents="sample", axes="bchw", skipped=7, is_local=False,
        latent_size=(9, 14), text=6,
    )  # fmt: skip


def dreamlite() -> TinyModel:
    """DreamLite: two images side by side; the deepest of three levels has self-attention."""
    model = built(
        diffusers.DreamLiteUNetModel, in_channels=4, out_channels=4, block_out_channels=(8, 8, 16),
        layers_per_block=1, norm_num_groups=2, cross_attention_dim=16, attention_head_dim=2,
        encoder_hid_dim=12, encoder_hid_dim_type="text_proj_rms", addition_embed_type="time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 18, 52), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 12, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4),
            "added_cond_kwargs": {"time_ids": noise(2, 6, seed=5)},
        },
        layouts={r".+\.attn1": TokenLayout.image(5, 13)},
        grid=(1, 18, 52), latents="sample", axes="bchw", skipped=8, is_local=False,
        latent_size=(18, 26), text=6,
    )  # fmt: skip


def controlnet_xs() -> TinyModel:
    """SD 2.1 with a ControlNet-XS: two levels of attention, even sizes, as it takes no others."""
    model = built(
        diffusers.UNetControlNetXSModel, sample_size=16, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2, norm_num_groups=2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, num_attention_heads=2, cross_attention_dim=16,
        ctrl_block_out_channels=(4, 8), ctrl_num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=(2, 2), ctrl_max_norm_num_groups=2,
    )  # fmt: skip
    top, deep = (TokenLayout.image(*size) for size in ((10, 14), (5, 7)))
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 10, 14), "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "controlnet_cond": noise(2, 3, 20, 28, seed=5),
        },
        layouts={
            r"(down_blocks\.0\.base_|up_blocks\.1\.)attentions\..+\.attn1": top,
            r"(down_blocks\.1\.base_|mid_block\.base_midblock\.|up_blocks\.0\.)"
            r"attentions\..+\.attn1": deep,
        },
        grid=(1, 10, 14), latents="sample", axes="bchw", skipped=11 + 10, is_local=False,
        latent_size=(10, 14), text=6,
    )  # fmt: skip


def cascade(second: bool = False) -> TinyModel:
    """Stable Cascade: tokens of CLIP are keys alone; the second stage has smaller levels."""
    kinds = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    stage = {
        "conditioning_dim": 16, "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
        "block_types_per_layer": (kinds, kinds), "clip_text_pooled_in_channels": 12,
        "timestep_ratio_embedding_dim": 8, "in_channels": 4, "out_channels": 4,
    }  # fmt: skip
    if second:
        stage |= {"patch_size": 2, "effnet_in_channels": 6, "clip_seq": 4}
    else:
        stage |= {"clip_text_in_channels": 10, "clip_image_in_channels": 14,
                  "switch_level": (False,)}  # fmt: skip
    model = built(diffusers.StableCascadeUNet, **stage)
    arguments = {
        "sample": noise(2, 4, 18, 26) if second else noise(2, 4, 9, 13),
        "timestep_ratio": torch.tensor([0.7, 0.7]), "clip_text_pooled": noise(2, 1, 12, seed=2),
    }  # fmt: skip
    if second:
        arguments["effnet"] = noise(2, 6, 5, 5, seed=3)
    else:
        arguments |= {"clip_text": noise(2, 6, 10, seed=3), "clip_img": noise(2, 1, 14, seed=5)}
    text = 4 if second else 6 + 4 + 4
    top = TokenLayout.image(9, 13, text_after=text)
    deep = TokenLayout.image(4, 6, text_after=text) if second else top
    return TinyModel(
        model, arguments,
        layouts={
            r"(down_blocks\.0|up_blocks\.1)\.2\.attention": top,
            r"(down_blocks\.1|up_blocks\.0)\.2\.attention": deep,
        },
        grid=(1, 9, 13), latents="sample", axes="bchw", is_local=False,
        latent_size=(18, 26) if second else (9, 13), text=6,
    )  # fmt: skip


MODELS = {
    "SD3Transformer2DModel": sd3,
    "UNet2DConditionModel": unet,
    "DreamLiteUNetModel": dreamlite,
    "UNetControlNetXSModel": controlnet_xs,
    "StableCascadeUNet": cascade,
    "StableCascadeUNet:second": lambda: cascade(second=True),
}
