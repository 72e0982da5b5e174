"""Cosmos: a video whose text, and a picture, are cross-attended."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def cosmos(condition: bool = False) -> TinyModel:
    """Cosmos 1: two blocks; 2.5 takes condition frames, a picture and control residuals."""
    newer = {
        "extra_pos_embed_type": None, "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 24, "encoder_hidden_states_channels": 16,
        "controlnet_block_every_n": 1, "img_context_dim_in": 12, "img_context_num_tokens": 4,
        "img_context_dim_out": 32,
    }  # fmt: skip
    model = built(
        diffusers.CosmosTransformer3DModel, in_channels=4 + condition, out_channels=4,
        num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        concat_padding_mask=False,  # a further channel, which takes torchvision
        **(newer if condition else {}),
    )  # fmt: skip
    if not condition:  # tokens would differ in content too
        for parameter in model.learnable_pos_embed.parameters():
            torch.nn.init.zeros_(parameter)
    text = noise(2, 6, 24 if condition else 16, seed=2)
    arguments = {
        "hidden_states": noise(2, 4, 3, 10, 18), "timestep": noise(2, seed=4),
        "encoder_hidden_states": text, "fps": 30,
        "attention_mask": lengths(6, 6, 4),
    }  # fmt: skip
    if condition:
        arguments |= {
            "encoder_hidden_states": (text, noise(2, 4, 12, seed=3)), "attention_mask": None,
            "condition_mask": torch.zeros(2, 1, 3, 10, 18).index_fill(2, torch.tensor(0), 1.0),
            "timestep": noise(2, 1, 3, 1, 1, seed=4), "fps": None,
            "block_controlnet_hidden_states": [noise(2, 135, 32, seed=5)] * 2,
        }  # fmt: skip
    return TinyModel(
        model, arguments,
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 5, 9)},
        grid=(3, 5, 9), axes="bcfhw", skipped=2, latent_size=(3, 10, 18), text=6,
        origin=(int(condition), 0, 0),  # the first frame has a time of its own
    )  # fmt: skip


MODELS = {
    "CosmosTransformer3DModel": cosmos,
    "CosmosTransformer3DModel:condition": lambda: cosmos(condition=True),
}
