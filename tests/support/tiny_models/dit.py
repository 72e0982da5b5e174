"""DiT, PixArt, HunyuanDiT and VQ-Diffusion: an image alone."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise

LAYOUT = TokenLayout.image(5, 13)


def dit() -> TinyModel:
    """DiT: two blocks; the model takes square images alone."""
    model = built(
        diffusers.DiTTransformer2DModel, in_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, num_embeds_ada_norm=10, sample_size=18,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 18, 18), "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 2]),
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.image(9, 9)},
        grid=(1, 9, 9), axes="bchw", latent_size=(18, 18),
    )  # fmt: skip


def pixart(sizes: bool = False) -> TinyModel:
    """PixArt: two blocks, text of two lengths; Alpha at 1024 is told the size."""
    model = built(
        diffusers.PixArtTransformer2DModel, in_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, cross_attention_dim=24, caption_channels=16, sample_size=26,
        use_additional_conditions=sizes,
    )  # fmt: skip
    told = {"resolution": noise(2, 2).abs(), "aspect_ratio": noise(2, 1).abs()}
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4),
            "added_cond_kwargs": told if sizes else dict.fromkeys(told),
        },
        layouts={r"transformer_blocks\.\d\.attn1": LAYOUT},
        grid=(1, 5, 13), axes="bchw", skipped=2, latent_size=(10, 26), text=6,
    )  # fmt: skip


def hunyuan_dit() -> TinyModel:
    """HunyuanDiT: four blocks, of which the last one gets the output of the first too."""
    model = built(
        diffusers.HunyuanDiT2DModel, in_channels=4, patch_size=2, hidden_size=24, num_layers=4,
        attention_head_dim=12, num_attention_heads=2, cross_attention_dim=8, sample_size=16,
        cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=4, text_len_t5=5,
        use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 4, 10, 26), "timestep": torch.tensor([3.0, 7.0]),
            "encoder_hidden_states": noise(2, 4, 8, seed=2),
            "text_embedding_mask": lengths(4, 4, 2).long(),
            "encoder_hidden_states_t5": noise(2, 5, 8, seed=3),
            "text_embedding_mask_t5": lengths(5, 5, 3).long(),
            "image_rotary_emb": get_2d_rotary_pos_embed(
                12, ((0, 0), (5, 13)), (5, 13), output_type="pt"
            ),
        },
        layouts={r"blocks\.\d\.attn1": LAYOUT},
        grid=(1, 5, 13), axes="bchw", skipped=4, latent_size=(10, 26), text=4,
    )  # fmt: skip


def vq_diffusion() -> TinyModel:
    """VQ-Diffusion: two blocks over codebook indices."""
    model = built(
        diffusers.Transformer2DModel, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        cross_attention_dim=8, sample_size=9, num_vector_embeds=12, norm_type="ada_norm",
        num_embeds_ada_norm=10, attention_bias=True, activation_fn="geglu-approximate",
    )  # fmt: skip
    ids = torch.randint(11, (2, 81), generator=torch.Generator().manual_seed(1))
    return TinyModel(
        model,
        {
            "hidden_states": ids, "timestep": torch.tensor(3),
            "encoder_hidden_states": noise(2, 6, 8, seed=2),
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout.image(9, 9)},
        grid=(1, 9, 9), axes="bn", predicted="bcn", skipped=2, latent_size=(9, 9), text=6,
    )  # fmt: skip


def transformer_2d() -> TinyModel:
    """The same class over continuous latents."""
    model = built(
        diffusers.Transformer2DModel, in_channels=8, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, cross_attention_dim=8, sample_size=13, norm_num_groups=2,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 8, 5, 13), "timestep": torch.tensor(3),
            "encoder_hidden_states": noise(2, 6, 8, seed=2),
        },
        layouts={r"transformer_blocks\.\d\.attn1": LAYOUT},
        grid=(1, 5, 13), axes="bchw", skipped=2, is_local=False, latent_size=(5, 13), text=6,
    )  # fmt: skip


MODELS = {
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "PixArtTransformer2DModel:sizes": lambda: pixart(sizes=True),
    "HunyuanDiT2DModel": hunyuan_dit,
    "Transformer2DModel": vq_diffusion,
    "Transformer2DModel:continuous": transformer_2d,
}
