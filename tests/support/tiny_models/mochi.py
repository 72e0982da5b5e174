"""Mochi: a video, then its text, each sample attended apart."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def mochi() -> TinyModel:
    """Mochi 1: two blocks, text of two lengths."""
    model = built(
        diffusers.MochiTransformer3DModel, patch_size=2, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=8, max_sequence_length=6,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 3, 10, 18), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4),
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9, text_after=6)},
        grid=(3, 5, 9), axes="bcfhw", cuts_text=True, origin=(0, 2, 4),
        latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS = {"MochiTransformer3DModel": mochi}
