"""Qwen-Image 2.1: text, images to edit inside of it, then the image."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise

GRID = (1, 8, 14)
TARGET = Segment("visual", 112, GRID)


def qwen(references: bool = False) -> TinyModel:
    """Two blocks; the image to edit has two text tokens before it and three behind."""
    model = built(
        diffusers.QwenImage21Transformer2DModel, in_channels=8, out_channels=8, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6), context_in_dim=12,
    )  # fmt: skip
    slots = [False] * 2 + [True] * 3 * references + [False] * 3
    images = [(1, 2, 6)] * references + [GRID]
    middle = [Segment("condition", 12, (1, 2, 6))] * references
    segments = (Segment("text", 2), *middle, Segment("text", 3), TARGET)
    mask = torch.tensor(slots + [True] * 28).expand(2, -1)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 112 + 12 * references, 8), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, len(slots), 12, seed=2), "img_mask": mask,
            "encoder_hidden_states_mask": lengths(len(slots), len(slots), len(slots) - 2),
            "img_shapes": [images] * 2,
        },
        layouts={r"transformer_blocks\.\d\.attn": TokenLayout(segments)},
        grid=GRID, start=12 * references, predicted_start=5 + 12 * references, text=5,
        origin=(0, 4, 7), latent_size=(8, 14),
    )  # fmt: skip


def cached() -> TinyModel:
    """A later step: the keys of all that precedes the image are kept."""
    tiny = qwen(references=True)
    cache = QwenImage21KVCache(2)
    tiny.predict(tiny.arguments | {"kv_cache": cache, "kv_cache_mode": "extract"})
    tiny.arguments |= {"kv_cache": cache, "kv_cache_mode": "cached"}
    tiny.predicted_start = 0
    return tiny


MODELS = {
    "QwenImage21Transformer2DModel": qwen,
    "QwenImage21Transformer2DModel:references": lambda: qwen(references=True),
    "QwenImage21Transformer2DModel:cached": cached,
}
