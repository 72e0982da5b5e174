"""Kandinsky 3 and Amused: attention between convolutions."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def kandinsky3() -> TinyModel:
    """Kandinsky 3: three of four levels have attention."""
    model = built(
        diffusers.Kandinsky3UNet, in_channels=4, time_embedding_dim=8, groups=2,
        attention_head_dim=4, layers_per_block=2, block_out_channels=(8, 8, 8, 16),
        cross_attention_dim=8, encoder_hid_dim=16,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "sample": noise(2, 4, 32, 48), "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4).float(),
        },
        layouts={
            rf"(down_blocks\.{level}|up_blocks\.{3 - level})\.attentions\.0\.attention": (
                TokenLayout.image(32 >> level, 48 >> level)
            )
            for level in (1, 2, 3)
        },
        grid=(1, 32, 48), latents="sample", axes="bchw", skipped=13, is_local=False,
        latent_size=(32, 48), text=6,
    )  # fmt: skip


def amused(halves: bool = False) -> TinyModel:
    """Amused: two layers in the middle; at 512 pixels the outer blocks halve the image."""
    model = built(
        diffusers.UVit2DModel, hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=4,
        micro_cond_embed_dim=20, encoder_hidden_size=8, vocab_size=20, codebook_size=16,
        in_channels=8, block_out_channels=8, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, downsample=halves,
        upsample=halves, sample_size=16,
    )  # fmt: skip
    ids = torch.randint(16, (2, 10, 26), generator=torch.Generator().manual_seed(1))
    layout = TokenLayout.image(5, 13) if halves else TokenLayout.image(10, 26)
    return TinyModel(
        model,
        {
            "input_ids": ids, "encoder_hidden_states": noise(2, 6, 8, seed=2),
            "pooled_text_emb": noise(2, 8, seed=3), "micro_conds": noise(2, 5, seed=4).abs(),
        },
        layouts={r"transformer_layers\.\d\.attn1": layout},
        grid=(1, 10, 26), latents="input_ids", axes="bhw", predicted="bchw", skipped=6,
        is_local=False, latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "Kandinsky3UNet": kandinsky3,
    "UVit2DModel": amused,
    "UVit2DModel:halves": lambda: amused(halves=True),
}
