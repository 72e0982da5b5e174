"""CogVideoX and what descends from it: text, then a video whose latents are (B, F, C, H, W)."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def cogvideox() -> TinyModel:
    """CogVideoX: two blocks, rotary positions."""
    model = built(
        diffusers.CogVideoXTransformer3DModel, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, time_embed_dim=2, text_embed_dim=32,
        sample_width=18, sample_height=10, sample_frames=9, max_text_seq_length=6,
        patch_size=2, temporal_compression_ratio=4, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = noise(3 * 5 * 9, 8, seed=6).repeat_interleave(2, 1)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 3, 4, 10, 18), "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9, text_before=6)},
        grid=(3, 5, 9), axes="bfchw", latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS = {"CogVideoXTransformer3DModel": cogvideox}
