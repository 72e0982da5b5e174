"""HunyuanVideo and what descends from it: a video, then its text."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def hunyuan_video() -> TinyModel:
    """HunyuanVideo: one double and one single block, a token refiner, text of two lengths."""
    model = built(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, attention_head_dim=10, num_attention_heads=2,
        patch_size=2, patch_size_t=1, rope_axes_dim=(2, 4, 4), guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 3, 10, 18), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4), "pooled_projections": noise(2, 8, seed=3),
            "guidance": noise(2, seed=5),
        },
        layouts={
            r"(single_)?transformer_blocks\.\d\.attn": TokenLayout.video(3, 5, 9, text_after=6)
        },
        grid=(3, 5, 9), axes="bcfhw", skipped=1, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS = {"HunyuanVideoTransformer3DModel": hunyuan_video}
