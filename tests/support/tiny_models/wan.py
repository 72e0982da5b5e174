"""Wan and what descends from it: a video whose text is cross-attended."""

from __future__ import annotations

from typing import Any

import diffusers

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import Builder, TinyModel, built, noise

SMALL = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32,
    "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "text_dim": 32,
    "freq_dim": 32, "rope_max_seq_len": 32,
}  # fmt: skip


def tiny(
    model_class: type, config: dict[str, Any] | None = None, skipped: int = 2, **arguments: Any
) -> TinyModel:
    """A model like Wan: two blocks, video alone in `attn1`."""
    model = built(model_class, **SMALL | (config or {}))
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, model.config.in_channels, 3, 10, 18),
            "timestep": noise(2, seed=4), "encoder_hidden_states": noise(2, 6, 32, seed=2),
            **arguments,
        },
        layouts={r"blocks\.\d\.attn1": TokenLayout.video(3, 5, 9)},
        grid=(3, 5, 9), axes="bcfhw", skipped=skipped, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


def with_image(model_class: type, **config: Any) -> TinyModel:
    """Image to video: the first frame in further channels, its image tokens before 512 of text."""
    image = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
    pictures = 4 if "pos_embed_seq_len" in config else 2
    model = tiny(
        model_class, image | config, encoder_hidden_states=noise(2, 512, 32, seed=2),
        encoder_hidden_states_image=noise(pictures, 257, 8, seed=3),
    )  # fmt: skip
    model.text = 512
    return model


def each_token_its_timestep() -> TinyModel:
    """Wan 2.2 TI2V: a timestep for each token, those of the first frame zero."""
    model = tiny(diffusers.WanTransformer3DModel, timestep=noise(2, 3 * 5 * 9, seed=4))
    model.per_token = ("timestep",)
    return model


def channels_of_another_video() -> TinyModel:
    """LucyEdit: the video to edit in further channels."""
    return tiny(diffusers.WanTransformer3DModel, {"in_channels": 32})


def vace() -> TinyModel:
    """VACE: one control block beside the first of two."""
    model = tiny(
        diffusers.WanVACETransformer3DModel, {"vace_layers": [0], "vace_in_channels": 24},
        skipped=4, control_hidden_states=noise(2, 24, 3, 10, 18, seed=3),
    )  # fmt: skip
    model.others = {r"vace_blocks\.0\.attn1": TokenLayout.video(3, 5, 9)}
    return model


def animate() -> TinyModel:
    """Animate: poses in all frames but the first, a face whose motion is cross-attended."""
    config = {
        "in_channels": 36, "latent_channels": 16, "image_dim": 8, "added_kv_proj_dim": 24,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16,
        "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }  # fmt: skip
    model = tiny(
        diffusers.WanAnimateTransformer3DModel, config, skipped=3,
        encoder_hidden_states=noise(2, 512, 32, seed=2),
        encoder_hidden_states_image=noise(2, 257, 8, seed=3),
        pose_hidden_states=noise(2, 16, 2, 10, 18, seed=5),
        face_pixel_values=noise(2, 3, 5, 16, 16, seed=6),
    )  # fmt: skip
    model.text, model.per_token = 512, ("pose_hidden_states",)
    return model


def forcing() -> TinyModel:
    """SkyReels V2 in diffusion forcing: a timestep for each frame, all in one causal block."""
    model = tiny(
        diffusers.SkyReelsV2Transformer3DModel, {"num_frame_per_block": 3},
        timestep=noise(2, 3, seed=4), enable_diffusion_forcing=True,
    )  # fmt: skip
    model.per_token = ("timestep",)
    return model


def anyflow_far(chunks: list[int]) -> TinyModel:
    """AnyFlow FAR: three frames after cached ones, all but the last chunk at half the size."""
    layers, before = SMALL["num_layers"], chunks[:-1]
    model = tiny(
        diffusers.AnyFlowFARTransformer3DModel, {"full_chunk_limit": 2},
        hidden_states=noise(2, 3, 16, 10, 18), timestep=noise(2, 3, seed=4),
        r_timestep=noise(2, 3, seed=5), chunk_partition=chunks,
        kv_cache=[
            {"full_cache": noise(2, 2, 2, 200, 12, seed=layer),
             "compressed_cache": noise(2, 2, 2, 200, 12, seed=layer + 7)}
            for layer in range(layers)
        ],
        kv_cache_flag={"num_cached_chunks": len(before), "is_cache_step": False},
    )  # fmt: skip
    cached = sum(before[:-1]) * 2 * 4 + sum(before[-1:]) * 5 * 9
    segments = (
        Segment("condition", cached), Segment("visual", 135, (3, 5, 9)), Segment("condition", 121),
    )  # fmt: skip
    model.layouts = {r"blocks\.\d\.attn1": TokenLayout(segments)}
    model.axes, model.per_token = "bfchw", ("timestep", "r_timestep")
    model.origin = (1 if before else 0, 0, 0)  # no frame of the chunk where others precede it
    return model


def anyflow() -> TinyModel:
    """AnyFlow: latents (B, F, C, H, W), two timesteps for each frame."""
    model = tiny(
        diffusers.AnyFlowTransformer3DModel, hidden_states=noise(2, 3, 16, 10, 18),
        timestep=noise(2, 3, seed=4), r_timestep=noise(2, 3, seed=5),
    )  # fmt: skip
    model.axes, model.per_token = "bfchw", ("timestep", "r_timestep")
    return model


MODELS: dict[str, Builder] = {
    "WanTransformer3DModel": lambda: tiny(diffusers.WanTransformer3DModel),
    "WanTransformer3DModel:image": lambda: with_image(diffusers.WanTransformer3DModel),
    "WanTransformer3DModel:first_and_last": lambda: with_image(
        diffusers.WanTransformer3DModel, pos_embed_seq_len=514
    ),
    "WanTransformer3DModel:ti2v": each_token_its_timestep,
    "WanTransformer3DModel:edit": channels_of_another_video,
    "WanVACETransformer3DModel": vace,
    "WanAnimateTransformer3DModel": animate,
    "SkyReelsV2Transformer3DModel": lambda: tiny(diffusers.SkyReelsV2Transformer3DModel),
    "SkyReelsV2Transformer3DModel:image": lambda: with_image(
        diffusers.SkyReelsV2Transformer3DModel
    ),
    "SkyReelsV2Transformer3DModel:forcing": forcing,
    "ChronoEditTransformer3DModel": lambda: with_image(diffusers.ChronoEditTransformer3DModel),
    "AnyFlowTransformer3DModel": anyflow,
    "AnyFlowFARTransformer3DModel": lambda: anyflow_far([2, 1, 3]),
    "AnyFlowFARTransformer3DModel:first": lambda: anyflow_far([3]),
}
