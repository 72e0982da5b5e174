"""Allegro: a video whose text is cross-attended."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def allegro(masked: bool = False) -> TinyModel:
    """Allegro: two blocks, text of two lengths; a video of which the second sample has less."""
    model = built(
        diffusers.AllegroTransformer3DModel, patch_size=2, num_attention_heads=2,
        attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_height=10, sample_width=18, sample_frames=3,
        caption_channels=16,
    )  # fmt: skip
    *tables, _, _, _ = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (5, 9)), (5, 9), 3)
    places = torch.cartesian_prod(*(torch.arange(side) for side in (3, 5, 9)))
    mask = torch.ones(2, 3, 10, 18)
    mask[1, ..., 14:] = 0.0
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 3, 10, 18), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4),
            "image_rotary_emb": (tuple(tables), tuple(places.T.unsqueeze(1))),
            "attention_mask": mask if masked else None,
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9)},
        grid=(3, 5, 9), axes="bcfhw", skipped=2, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS = {
    "AllegroTransformer3DModel": allegro,
    "AllegroTransformer3DModel:masked": lambda: allegro(masked=True),
}
