"""Wan and what descends from it: a video whose text is cross-attended."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def wan() -> TinyModel:
    """Wan 2.1: two blocks."""
    model = built(
        diffusers.WanTransformer3DModel, num_layers=2, num_attention_heads=2,
        attention_head_dim=12, ffn_dim=32, in_channels=16, out_channels=16, patch_size=(1, 2, 2),
        text_dim=32, freq_dim=32, rope_max_seq_len=32,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 16, 3, 10, 18), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
        },
        layouts={r"blocks\.\d\.attn1": TokenLayout.video(3, 5, 9)},
        grid=(3, 5, 9), axes="bcfhw", skipped=2, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS = {"WanTransformer3DModel": wan}
