"""OmniGen: a language model over text, a time token and the image."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise


def omnigen(references: bool = False) -> TinyModel:
    """OmniGen: two blocks, text of two lengths filled up at its left, causal; images in it."""
    model = built(
        diffusers.OmniGenTransformer2DModel, in_channels=4, hidden_size=32,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=2,
        pad_token_id=0, vocab_size=16, time_step_dim=16, pos_embed_max_size=32,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    )  # fmt: skip
    text, count = 20, 20 + 1 + 65
    mask = torch.ones(count, count).tril()
    mask[text + 1 :] = 1
    mask = mask.repeat(2, 1, 1)
    mask[1, 2:, :2] = 0
    mask[1, :2] = 1
    arguments = {
        "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4),
        "input_ids": torch.arange(text).remainder(16).repeat(2, 1),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": mask,
        "position_ids": torch.stack(
            [torch.arange(count), (torch.arange(count) - 2).clamp(min=0)]
        ),
    }  # fmt: skip
    if references:
        arguments["input_img_latents"] = [noise(1, 4, 6, 8, seed=5)]
        arguments["input_image_sizes"] = {0: [[4, 16]]}
        mask[0, 4:16, 4:16] = 1
    parts = (Segment("text", text), Segment("condition", 1), Segment("visual", 65, (1, 5, 13)))
    return TinyModel(
        model,
        arguments,
        layouts={r"layers\.\d\.self_attn": TokenLayout(parts)},
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=text,
    )  # fmt: skip


MODELS = {
    "OmniGenTransformer2DModel": omnigen,
    "OmniGenTransformer2DModel:references": lambda: omnigen(references=True),
}
