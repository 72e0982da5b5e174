"""CogView3-Plus and CogView4: text, then an image."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def cogview(model_class: Any, **config: Any) -> TinyModel:
    """Two blocks."""
    model = built(
        model_class, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        pos_embed_max_size=16, sample_size=16, **config,
    )  # fmt: skip
    sizes = torch.tensor([[20.0, 52.0]] * 2)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": noise(2, 6, 16, seed=2), "original_size": sizes,
            "target_size": sizes, "crop_coords": 0 * sizes,
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.image(5, 13, text_before=6)},
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "CogView4Transformer2DModel": lambda: cogview(
        diffusers.CogView4Transformer2DModel, rope_axes_dim=(32, 32)
    ),
    "CogView3PlusTransformer2DModel": lambda: cogview(diffusers.CogView3PlusTransformer2DModel),
}
