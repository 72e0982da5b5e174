"""Ernie-Image: the image first, then text."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def ernie_image() -> TinyModel:
    """Ernie-Image: two blocks, text of two lengths."""
    model = built(
        diffusers.ErnieImageTransformer2DModel, hidden_size=32, num_attention_heads=2,
        num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4, text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 5, 13), "timestep": noise(2, seed=4),
            "text_bth": noise(2, 6, 16, seed=2), "text_lens": torch.tensor([6, 4]),
        },
        layouts={r"layers\.\d\.self_attention": TokenLayout.image(5, 13, text_after=6)},
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {"ErnieImageTransformer2DModel": ernie_image}
