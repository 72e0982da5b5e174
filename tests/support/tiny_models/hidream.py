"""HiDream: an image, what fills it up, then three texts."""

from __future__ import annotations

import diffusers

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise


def hidream(square: bool = False) -> TinyModel:
    """HiDream: one block of each kind, all experts at work; texts of 4 and twice 6 tokens."""
    model = built(
        diffusers.HiDreamImageTransformer2DModel, patch_size=2, in_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        caption_channels=[16, 12], text_emb_dim=8, num_routed_experts=2, num_activated_experts=2,
        axes_dims_rope=(4, 4, 4), max_resolution=(18, 18), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    height, width = (9, 9) if square else (5, 13)
    segments = (
        Segment("visual", height * width, (1, height, width)),
        *([] if square else [Segment("condition", 16)]), Segment("text", 4 + 6 + 6),
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 2 * height, 2 * width), "timesteps": noise(2, seed=4),
            "encoder_hidden_states_t5": noise(2, 4, 16, seed=2),
            "encoder_hidden_states_llama3": noise(2, 2, 6, 12, seed=3),
            "pooled_embeds": noise(2, 8, seed=5),
        },
        layouts={r"(double|single)_stream_blocks\.\d\.block\.attn1": TokenLayout(segments)},
        grid=(1, height, width), axes="bchw", latent_size=(2 * height, 2 * width), text=5,
    )  # fmt: skip


MODELS = {
    "HiDreamImageTransformer2DModel": hidream,
    "HiDreamImageTransformer2DModel:square": lambda: hidream(square=True),
}
