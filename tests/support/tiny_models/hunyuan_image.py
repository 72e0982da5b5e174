"""HunyuanImage: an image, then glyphs and text; its refiner has a video's axes."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def hunyuan_image(glyphs: bool = False) -> TinyModel:
    """HunyuanImage 2.1: one double and one single block, a token refiner."""
    model = built(
        diffusers.HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, attention_head_dim=12, num_attention_heads=2,
        text_embed_dim=16, text_embed_2_dim=8 if glyphs else None, rope_axes_dim=(6, 6),
        guidance_embeds=not glyphs, use_meanflow=not glyphs,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(2, 4, 5, 13), "timestep": noise(2, seed=4),
        "encoder_hidden_states": noise(2, 6, 16, seed=2),
        "encoder_attention_mask": lengths(6, 6, 4),
    }  # fmt: skip
    if glyphs:
        arguments["encoder_hidden_states_2"] = noise(2, 5, 8, seed=3)
        arguments["encoder_attention_mask_2"] = lengths(5, 0, 3)
    else:
        arguments |= {"guidance": noise(2, seed=5), "timestep_r": noise(2, seed=6)}
    layout = TokenLayout.image(5, 13, text_after=6 + 5 * glyphs)
    return TinyModel(
        model, arguments, layouts={r"(single_)?transformer_blocks\.\d\.attn": layout},
        grid=(1, 5, 13), axes="bchw", skipped=1, latent_size=(5, 13), text=6,
    )  # fmt: skip


def refiner() -> TinyModel:
    """The refiner: latents (B, C, F, H, W)."""
    model = built(
        diffusers.HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, attention_head_dim=12, num_attention_heads=2,
        text_embed_dim=16, patch_size=(1, 1, 1), rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 3, 5, 9), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4),
        },
        layouts={
            r"(single_)?transformer_blocks\.\d\.attn": TokenLayout.video(3, 5, 9, text_after=6)
        },
        grid=(3, 5, 9), axes="bcfhw", skipped=1, latent_size=(3, 5, 9), text=6,
    )  # fmt: skip


MODELS = {
    "HunyuanImageTransformer2DModel": hunyuan_image,
    "HunyuanImageTransformer2DModel:glyphs": lambda: hunyuan_image(glyphs=True),
    "HunyuanImageTransformer2DModel:refiner": refiner,
}
