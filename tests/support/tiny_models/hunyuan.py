"""HunyuanVideo and what descends from it: a video, then its text."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import Builder, TinyModel, built, lengths, noise

SMALL = {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "num_refiner_layers": 1, "attention_head_dim": 10, "num_attention_heads": 2,
    "patch_size": 2, "patch_size_t": 1, "rope_axes_dim": (2, 4, 4), "text_embed_dim": 16,
}  # fmt: skip
VIDEO = Segment("visual", 135, (3, 5, 9))
JOINT = r"(single_)?transformer_blocks\.\d\.attn"


def tiny(
    model_class: type, layouts: dict[str, TokenLayout], skipped: int, config: dict[str, Any],
    **arguments: Any,
) -> TinyModel:  # fmt: skip
    """A model like HunyuanVideo: one double and one single block."""
    model = built(model_class, **config)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, model.config.in_channels, 3, 10, 18),
            "timestep": noise(2, seed=4), "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4), **arguments,
        },
        layouts=layouts, grid=(3, 5, 9), axes="bcfhw", skipped=skipped, latent_size=(3, 10, 18),
        text=6,
    )  # fmt: skip


def hunyuan_video(**config: Any) -> TinyModel:
    """HunyuanVideo: a token refiner, text of two lengths."""
    guidance = {} if config.get("guidance_embeds") is False else {"guidance": noise(2, seed=5)}
    return tiny(
        diffusers.HunyuanVideoTransformer3DModel,
        {JOINT: TokenLayout.video(3, 5, 9, text_after=6)}, 1,
        SMALL | {"pooled_projection_dim": 8, "guidance_embeds": True} | config,
        pooled_projections=noise(2, 8, seed=3), **guidance,
    )  # fmt: skip


def hunyuan_video_15(picture: bool = False) -> TinyModel:
    """HunyuanVideo 1.5: two double blocks; picture, glyphs and text after the video."""
    config = SMALL | {
        "num_layers": 2, "in_channels": 9, "text_embed_2_dim": 8, "image_embed_dim": 12,
    }  # fmt: skip
    del config["num_single_layers"]
    model = tiny(
        diffusers.HunyuanVideo15Transformer3DModel,
        {JOINT: TokenLayout.video(3, 5, 9, text_after=6 + 5 + 7)}, 1, config,
        encoder_hidden_states_2=noise(2, 5, 8, seed=3), encoder_attention_mask_2=lengths(5, 0, 3),
        image_embeds=noise(2, 7, 12, seed=6) if picture else torch.zeros(2, 7, 12),
    )  # fmt: skip
    model.predicted = "bcfhw"
    return model


def framepack(batch: int = 2) -> TinyModel:
    """Framepack: history at three scales, the coarser ones padded; cut text in a batch of one."""
    config = SMALL | {
        "pooled_projection_dim": 8, "guidance_embeds": True, "image_proj_dim": 12,
        "has_image_proj": True, "has_clean_x_embedder": True,
    }  # fmt: skip
    segments = (
        Segment("condition", 2 * 2 * 3, (2, 2, 3)), Segment("condition", 1 * 3 * 5, (1, 3, 5)),
        Segment("condition", 2 * 5 * 9, (2, 5, 9)), VIDEO, Segment("condition", 7),
        Segment("text", 6 if batch == 2 else 4),
    )  # fmt: skip
    model = tiny(
        diffusers.HunyuanVideoFramepackTransformer3DModel, {JOINT: TokenLayout(segments)}, 1,
        config,
        pooled_projections=noise(2, 8, seed=3), guidance=noise(2, seed=5),
        image_embeds=noise(2, 7, 12, seed=6), indices_latents=torch.arange(3),
        latents_clean=noise(2, 4, 2, 10, 18, seed=7), indices_latents_clean=torch.arange(3, 5),
        latents_history_2x=noise(2, 4, 2, 10, 18, seed=8),
        indices_latents_history_2x=torch.arange(5, 7),
        latents_history_4x=noise(2, 4, 5, 10, 18, seed=9),
        indices_latents_history_4x=torch.arange(7, 12),
    )  # fmt: skip
    if batch == 1:
        model.arguments = {
            name: value[1:] if len(value) == 2 and "indices" not in name else value
            for name, value in model.arguments.items()
        }
    return model


def motif(picture: bool = False, decodes: bool = False) -> TinyModel:
    """Motif-Video: the last single block may decode; text is cross-attended beside."""
    config = SMALL | {
        "num_single_layers": 1 + decodes, "num_decoder_layers": int(decodes), "in_channels": 9,
        "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True,
        "image_embed_dim": 12 if picture else None,
    }  # fmt: skip
    del config["num_refiner_layers"]
    joint = TokenLayout((VIDEO, Segment("condition", 7 * picture), Segment("text", 6)))
    decoder = TokenLayout((VIDEO, Segment("condition", 135, (3, 5, 9))))
    model = tiny(
        diffusers.MotifVideoTransformer3DModel,
        {r"single_transformer_blocks\.1\.attn": decoder, JOINT: joint}, 2, config,
        **({"image_embeds": noise(2, 7, 12, seed=6)} if picture else {}),
    )  # fmt: skip
    model.is_local = not decodes  # every token of a decoder sees the whole video once more
    return model


MODELS: dict[str, Builder] = {
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "HunyuanVideoTransformer3DModel:latent_concat": lambda: hunyuan_video(
        image_condition_type="latent_concat", in_channels=9
    ),
    "HunyuanVideoTransformer3DModel:token_replace": lambda: hunyuan_video(
        image_condition_type="token_replace"
    ),
    "HunyuanVideoTransformer3DModel:skyreels": lambda: hunyuan_video(in_channels=8),
    "HunyuanVideo15Transformer3DModel": hunyuan_video_15,
    "HunyuanVideo15Transformer3DModel:image": lambda: hunyuan_video_15(picture=True),
    "HunyuanVideoFramepackTransformer3DModel": framepack,
    "HunyuanVideoFramepackTransformer3DModel:one": lambda: framepack(batch=1),
    "MotifVideoTransformer3DModel": motif,
    "MotifVideoTransformer3DModel:image": lambda: motif(picture=True),
    "MotifVideoTransformer3DModel:decoder": lambda: motif(decodes=True),
}
