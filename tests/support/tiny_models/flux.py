"""FLUX and what descends from it: packed images, text first."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise


def image_ids(height: int, width: int, index: int = 0) -> torch.Tensor:
    """Position ids (tokens, 3) of one image."""
    return torch.cartesian_prod(
        torch.tensor([float(index)]), torch.arange(float(height)), torch.arange(float(width))
    )


def flux(references: bool = False) -> TinyModel:
    """FLUX.1: two double and two single blocks; Kontext appends an image to edit."""
    model = built(
        diffusers.FluxTransformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    grid = (1, 5, 13)
    ids = image_ids(5, 13)
    segments = [Segment("text", 6), Segment("visual", 65, grid)]
    if references:
        ids = torch.cat([ids, image_ids(3, 4, index=1)])
        segments.append(Segment("condition", 12, (1, 3, 4)))
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, len(ids), 16),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "pooled_projections": noise(2, 32, seed=3), "timestep": noise(2, seed=4),
            "img_ids": ids, "txt_ids": torch.zeros(6, 3),
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout(tuple(segments))},
        grid=grid, latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "FluxTransformer2DModel": flux,
    "FluxTransformer2DModel:references": lambda: flux(references=True),
}
