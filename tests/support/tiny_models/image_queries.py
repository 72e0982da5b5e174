"""PRX and Nucleus: the image alone asks, text is keys."""

from __future__ import annotations

import diffusers

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def prx() -> TinyModel:
    """PRX: two blocks, text of two lengths before the image."""
    model = built(
        diffusers.PRXTransformer2DModel, in_channels=4, context_in_dim=16, hidden_size=24,
        mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[6, 6], resolution_embeds=True,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4).abs(),
            "encoder_hidden_states": noise(2, 6, 16, seed=2), "attention_mask": lengths(6, 6, 4),
        },
        layouts={r"blocks\.\d\.attention": TokenLayout.image(5, 13, text_before=6)},
        grid=(1, 5, 13), axes="bchw", latent_size=(10, 26), text=6,
    )  # fmt: skip


def nucleus() -> TinyModel:
    """Nucleus: two blocks, grouped heads, two experts that both take every token."""
    model = built(
        diffusers.NucleusMoEImageTransformer2DModel, in_channels=8, out_channels=2, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6), mlp_ratio=8.0, num_experts=2,
        moe_intermediate_dim=16, capacity_factors=2.0,
        dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 3:  # experts, which the model leaves as memory was
            parameter.data = 0.1 * noise(*parameter.shape, seed=7)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 7 * 13, 8), "img_shapes": [(1, 7, 13)] * 2,
            "encoder_hidden_states": noise(2, 6, 12, seed=2),
            "encoder_hidden_states_mask": lengths(6, 6, 4),
            "timestep": noise(2, seed=4).abs(),
        },
        layouts={r"transformer_blocks\.\d\.attn": TokenLayout.image(7, 13, text_after=6)},
        grid=(1, 7, 13), origin=(0, 4, 7), latent_size=(14, 26), text=6,
    )  # fmt: skip


MODELS = {
    "PRXTransformer2DModel": prx,
    "NucleusMoEImageTransformer2DModel": nucleus,
}
