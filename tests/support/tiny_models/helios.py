"""Helios: a video after its history at three scales."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import Builder, TinyModel, built, noise


def helios(history: bool = True) -> TinyModel:
    """Helios: two blocks; the coarser history is padded."""
    model = built(
        diffusers.HeliosTransformer3DModel, num_layers=2, num_attention_heads=2,
        attention_head_dim=12, rope_dim=(4, 4, 4), ffn_dim=32, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, is_amplify_history=True,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(2, 4, 3, 10, 18), "timestep": noise(2, seed=4),
        "encoder_hidden_states": noise(2, 6, 32, seed=2),
    }  # fmt: skip
    segments = [Segment("visual", 135, (3, 5, 9))]
    if history:
        first = 3
        for name, count in (("long", 5), ("mid", 2), ("short", 2)):
            arguments[f"latents_history_{name}"] = noise(2, 4, count, 10, 18, seed=first)
            arguments[f"indices_latents_history_{name}"] = torch.arange(first, first + count)[None]
            first += count
        arguments["indices_hidden_states"] = torch.arange(3)[None]
        segments = [
            Segment("condition", 2 * 2 * 3, (2, 2, 3)), Segment("condition", 1 * 3 * 5, (1, 3, 5)),
            Segment("condition", 2 * 5 * 9, (2, 5, 9)), *segments,
        ]  # fmt: skip
    return TinyModel(
        model, arguments, layouts={r"blocks\.\d\.attn1": TokenLayout(tuple(segments))},
        grid=(3, 5, 9), axes="bcfhw", skipped=2, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS: dict[str, Builder] = {
    "HeliosTransformer3DModel": helios,
    "HeliosTransformer3DModel:first": lambda: helios(history=False),
}
