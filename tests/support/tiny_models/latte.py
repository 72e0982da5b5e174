"""Latte: attention over each frame, then along time."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def latte() -> TinyModel:
    """Latte: two blocks over frames, two along time."""
    model = built(
        diffusers.LatteTransformer3DModel, num_attention_heads=2, attention_head_dim=8,
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=16, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_single", caption_channels=12,
        norm_elementwise_affine=False, video_length=3, attention_bias=True,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 3, 10, 18), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 12, seed=2),
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.image(5, 9)},
        grid=(3, 5, 9), axes="bcfhw", skipped=4, latent_size=(3, 10, 18), text=6,
        others={r"temporal_transformer_blocks\.\d\.attn1": TokenLayout.video(3, 1, 1)},
    )  # fmt: skip


MODELS = {"LatteTransformer3DModel": latte}
