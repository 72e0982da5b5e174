"""LTX-Video and what descends from it: a packed video, text cross-attended."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def ltx() -> TinyModel:
    """LTX-Video: two blocks, text of two lengths."""
    model = built(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=32,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 3 * 5 * 9, 8), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4),
            "num_frames": 3, "height": 5, "width": 9,
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9)},
        grid=(3, 5, 9), skipped=2, latent_size=(3, 5, 9), text=6,
    )  # fmt: skip


MODELS = {"LTXVideoTransformer3DModel": ltx}
