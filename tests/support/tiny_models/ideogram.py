"""Ideogram 4: one sequence with marks of what each token is."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def ideogram(text: int = 6) -> TinyModel:
    """Ideogram 4: two blocks, text of two lengths filled up at its left; or no text at all."""
    model = built(
        diffusers.Ideogram4Transformer2DModel, in_channels=8, num_layers=2, attention_head_dim=18,
        num_attention_heads=2, intermediate_size=32, adaln_dim=16, llm_features_dim=16,
        mrope_section=(3, 3, 3), rope_theta=100,
    )  # fmt: skip
    image = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(13)) + 65_536
    count = text + 65
    ids = torch.zeros(2, count, 3, dtype=torch.long)
    segments = torch.ones(2, count, dtype=torch.long)
    marks = torch.full((2, count), 2)
    for sample, padding in enumerate((0, 2) if text else ()):
        places = torch.arange(text - padding)
        ids[sample, padding:text] = places[:, None]
        segments[sample, :padding] = -1
        marks[sample, :padding], marks[sample, padding:text] = 0, 3
    ids[:, text:] = image
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, count, 8), "timestep": noise(2, seed=4).sigmoid(),
            "encoder_hidden_states": noise(2, count, 16, seed=2),
            "position_ids": ids, "segment_ids": segments, "indicator": marks,
        },
        layouts={r"layers\.\d\.attention": TokenLayout.image(5, 13, text_before=text)},
        grid=(1, 5, 13), start=text, latent_size=(10, 26), text=text,
        wave_error=8e-3,  # half a step of fp32 at 65536 radians is 4e-3
    )  # fmt: skip


MODELS = {
    "Ideogram4Transformer2DModel": ideogram,
    "Ideogram4Transformer2DModel:unconditional": lambda: ideogram(text=0),
}
