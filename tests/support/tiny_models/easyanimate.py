"""EasyAnimate: text, then a video."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, noise


def easyanimate(inpaints: bool = False) -> TinyModel:
    """EasyAnimate: a block with weights for the text, one without; two texts, a masked video."""
    further = {"text_embed_dim_t5": 12} if inpaints else {}
    model = built(
        diffusers.EasyAnimateTransformer3DModel, num_attention_heads=2, attention_head_dim=16,
        in_channels=9 if inpaints else 4, out_channels=4, patch_size=2, num_layers=2,
        mmdit_layers=1, time_embed_dim=8, text_embed_dim=16, **further,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(2, 4, 3, 12, 18), "timestep": noise(2, seed=4),
        "encoder_hidden_states": noise(2, 6, 16, seed=2),
    }  # fmt: skip
    if inpaints:
        arguments["encoder_hidden_states_t5"] = noise(2, 3, 12, seed=3)
        arguments["inpaint_latents"] = noise(2, 5, 3, 1, 1, seed=5).expand(-1, -1, -1, 12, 18)
    text = 9 if inpaints else 6
    return TinyModel(
        model, arguments,
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.video(3, 6, 9, text_before=text)},
        grid=(3, 6, 9), axes="bcfhw", latent_size=(3, 12, 18), text=6,
        origin=(int(inpaints), 0, 0),  # what is inpainted differs from frame to frame
    )  # fmt: skip


MODELS = {
    "EasyAnimateTransformer3DModel": easyanimate,
    "EasyAnimateTransformer3DModel:inpaint": lambda: easyanimate(inpaints=True),
}
