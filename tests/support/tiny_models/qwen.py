"""Qwen-Image and what descends from it."""

from __future__ import annotations

import diffusers

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def qwen(references: bool = False) -> TinyModel:
    """Qwen-Image: text first, of two lengths; Edit appends images to edit."""
    model = built(
        diffusers.QwenImageTransformer2DModel, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6),
        joint_attention_dim=16,
    )  # fmt: skip
    grids = [(1, 5, 9), *([(1, 3, 4)] if references else [])]
    segments = [Segment("text", 6), Segment("visual", 45, (1, 5, 9))]
    if references:
        segments.append(Segment("condition", 12, (1, 3, 4)))
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 45 + 12 * references, 16),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_hidden_states_mask": lengths(6, 6, 4), "timestep": noise(2, seed=4),
            "img_shapes": [grids] * 2,
        },
        layouts={r"transformer_blocks\.\d\.attn": TokenLayout(tuple(segments))},
        grid=(1, 5, 9), latent_size=(10, 18), text=6, origin=(0, 3, 5),
    )  # fmt: skip


MODELS = {
    "QwenImageTransformer2DModel": qwen,
    "QwenImageTransformer2DModel:references": lambda: qwen(references=True),
}
