"""Lumina-Next and Lumina-Image 2.0."""

from __future__ import annotations

import diffusers
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def lumina2() -> TinyModel:
    """Lumina 2: a refiner of each kind, two layers, grouped heads, texts of one length."""
    model = built(
        diffusers.Lumina2Transformer2DModel, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(4, 4, 4), axes_lens=(64, 32, 32), cap_feat_dim=16, sample_size=26,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4).abs(),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 4, 4).long(),
        },
        layouts={
            r"noise_refiner\.\d\.attn": TokenLayout.image(5, 13),
            r"layers\.\d\.attn": TokenLayout.image(5, 13, text_before=4),
        },
        grid=(1, 5, 13), axes="bchw", skipped=1, latent_size=(10, 26), text=6,
    )  # fmt: skip


def lumina_next() -> TinyModel:
    """Lumina-Next: two layers, text of two lengths."""
    model = built(
        diffusers.LuminaNextDiT2DModel, in_channels=4, hidden_size=16, num_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, cross_attention_dim=12,
        sample_size=26,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4).abs(),
            "encoder_hidden_states": noise(2, 6, 12, seed=2), "encoder_mask": lengths(6, 6, 4),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
            "cross_attention_kwargs": {},
        },
        layouts={r"layers\.\d\.attn1": TokenLayout.image(5, 13)},
        grid=(1, 5, 13), axes="bchw", skipped=2, latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {"Lumina2Transformer2DModel": lumina2, "LuminaNextDiT2DModel": lumina_next}
