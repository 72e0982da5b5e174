"""CogVideoX and what descends from it: text, then a video whose latents are (B, F, C, H, W)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def rotary(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns the tables that the pipelines make of a head of 16."""
    sides = height, width
    return get_3d_rotary_pos_embed(16, ((0, 0), sides), sides, frames)


def cogvideox(patch_t: int | None = None) -> TinyModel:
    """CogVideoX: two blocks, rotary positions; 1.5 patches frames, and takes a first frame."""
    newer = {"patch_size_t": patch_t, "patch_bias": False, "ofs_embed_dim": 2} if patch_t else {}
    channels = 8 if patch_t else 4  # those of the picture to begin with
    model = built(
        diffusers.CogVideoXTransformer3DModel, in_channels=channels, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, time_embed_dim=2, text_embed_dim=32,
        sample_width=18, sample_height=10, sample_frames=9, max_text_seq_length=6,
        patch_size=2, temporal_compression_ratio=4, use_rotary_positional_embeddings=True, **newer,
    )  # fmt: skip
    frames = 3 * (patch_t or 1)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, frames, channels, 10, 18),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "image_rotary_emb": rotary(3, 5, 9),
            "ofs": torch.full((1,), 2.0) if patch_t else None,
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9, text_before=6)},
        grid=(3, 5, 9), axes="bfchw", latent_size=(frames, 10, 18), text=6,
    )  # fmt: skip


def consisid() -> TinyModel:
    """ConsisID: two blocks, the first followed by cross-attention to a face."""
    model = built(
        diffusers.ConsisIDTransformer3DModel, in_channels=8, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=3, time_embed_dim=2, text_embed_dim=32,
        sample_width=18, sample_height=10, sample_frames=9, max_text_seq_length=6, patch_size=2,
        is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=4, cross_attn_num_heads=2,
        LFE_id_dim=6, LFE_vit_dim=8, LFE_depth=2, LFE_dim_head=4, LFE_num_heads=2,
        LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=32, LFE_ff_mult=1, LFE_num_scale=2,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 3, 8, 10, 18), "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": noise(2, 6, 32, seed=2), "id_cond": noise(2, 6, seed=3),
            "id_vit_hidden": [noise(2, 5, 8, seed=5)] * 2,
            "image_rotary_emb": rotary(3, 5, 9),
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9, text_before=6)},
        grid=(3, 5, 9), axes="bfchw", latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS = {
    "CogVideoXTransformer3DModel": cogvideox,
    "CogVideoXTransformer3DModel:1.5": lambda: cogvideox(patch_t=2),
    "ConsisIDTransformer3DModel": consisid,
}
