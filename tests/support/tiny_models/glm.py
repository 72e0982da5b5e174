"""GLM-Image: text first, and before it what an image to edit has left in a cache."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise


def glm_image(edits: bool = False) -> TinyModel:
    """GLM-Image: two blocks; editing, all samples read one image of 3 x 4 tokens."""
    model = built(
        diffusers.GlmImageTransformer2DModel, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, text_embed_dim=16, time_embed_dim=16,
        condition_dim=4, prior_vq_quantizer_codebook_size=32,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4),
        "encoder_hidden_states": noise(2, 6, 16, seed=2),
        "prior_token_id": torch.ones(2, 65, dtype=torch.long),
        "prior_token_drop": torch.zeros(2, 65, dtype=torch.bool),
        "target_size": noise(2, 2, seed=5), "crop_coords": noise(2, 2, seed=6),
    }  # fmt: skip
    segments = [Segment("text", 6), Segment("visual", 65, (1, 5, 13))]
    if edits:
        cache = GlmImageKVCache(2)
        cache.set_mode("write")
        seen = {
            **{name: tensor[:1] for name, tensor in arguments.items()},
            "hidden_states": noise(1, 4, 6, 8, seed=7), "kv_caches": cache,
            "encoder_hidden_states": torch.zeros(1, 0, 16),
            "prior_token_id": torch.ones(1, 12, dtype=torch.long),
            "prior_token_drop": torch.zeros(1, 12, dtype=torch.bool),
        }  # fmt: skip
        with torch.no_grad():
            model(**seen)
        cache.set_mode("read")
        arguments["kv_caches"] = cache
        segments.insert(0, Segment("condition", 12))
    return TinyModel(
        model,
        arguments,
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout(tuple(segments))},
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "GlmImageTransformer2DModel": glm_image,
    "GlmImageTransformer2DModel:editing": lambda: glm_image(edits=True),
}
