"""AuraFlow: register tokens, text, then the image."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise


def auraflow() -> TinyModel:
    """AuraFlow: one block of two streams, two of one."""
    model = built(
        diffusers.AuraFlowTransformer2DModel, sample_size=26, in_channels=4, out_channels=4,
        num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    with torch.no_grad():  # gates of attention, which start near zero
        for name, parameter in model.named_parameters():
            if "norm1" in name:
                parameter.mul_(8.0)
    layout = TokenLayout(
        (Segment("condition", 8), Segment("text", 6), Segment("visual", 65, (1, 5, 13)))
    )
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
        },
        layouts={r"(joint|single)_transformer_blocks\.\d\.attn": layout},
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {"AuraFlowTransformer2DModel": auraflow}
