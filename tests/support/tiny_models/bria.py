"""Bria 3.2, Fibo and Fibo 2."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise
from tiny_models.flux import IMAGE, REFERENCE, TEXT, image_ids


def bria() -> TinyModel:
    """Bria 3.2: two double and two single blocks."""
    model = built(
        diffusers.BriaTransformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 65, 16), "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "timestep": noise(2, seed=4), "img_ids": image_ids(5, 13),
            "txt_ids": torch.zeros(6, 3),
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout((TEXT, IMAGE))},
        grid=(1, 5, 13), latent_size=(10, 26), text=6,
    )  # fmt: skip


def fibo(references: bool = False) -> TinyModel:
    """Fibo: text features for each block; text of two lengths; Edit appends images."""
    model = built(
        diffusers.BriaFiboTransformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=[4, 6, 6], text_encoder_dim=16,
    )  # fmt: skip
    ids, segments = image_ids(5, 13), [TEXT, IMAGE]
    if references:
        ids, segments = torch.cat([ids, image_ids(3, 4, index=1)]), [TEXT, IMAGE, REFERENCE]
    mask = torch.cat([lengths(6, 6, 4), lengths(len(ids), len(ids), len(ids))], 1)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, len(ids), 16), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "text_encoder_layers": [noise(2, 6, 16, seed=seed) for seed in range(6, 10)],
            "img_ids": ids, "txt_ids": torch.zeros(6, 3),
            "joint_attention_kwargs": {"attention_mask": mask[:, None, None]},
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout(tuple(segments))},
        grid=(1, 5, 13), latent_size=(5, 13), text=6,
    )  # fmt: skip


def fibo2(texts: tuple[int, int] = (6, 6), references: bool = False) -> TinyModel:
    """Fibo 2: a refiner, then two blocks, one of which reads the text; gist by text lengths."""
    model = built(
        diffusers.BriaFibo2Transformer2DModel, in_channels=4, patch_size=2, dim=32, n_layers=2,
        n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=8, gist_step=2,
        gist_min_text_len=2, gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(64, 64, 64),
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(2, 4, 10, 26), "timestep": noise(2, seed=4).abs(),
        "encoder_hidden_states": noise(2, 2, 6, 16, seed=2),
    }  # fmt: skip
    images = [IMAGE]
    if references:
        arguments["context_latents"] = [noise(2, 4, 6, 8, seed=5)]
        images.append(REFERENCE)
    gist, order = Segment("text", 6), [Segment("text", 6), *images]
    if texts != (6, 6):
        arguments["encoder_attention_mask"] = lengths(6, *texts)
        order = [*images, gist]
    return TinyModel(
        model,
        arguments,
        layouts={
            r"layers\.\d\.attention": TokenLayout(tuple(order)),
            r"noise_refiner\.\d\.attention": TokenLayout(tuple(images)),
        },
        grid=(1, 5, 13), axes="bchw", skipped=3, latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "BriaTransformer2DModel": bria,
    "BriaFiboTransformer2DModel": fibo,
    "BriaFiboTransformer2DModel:references": lambda: fibo(references=True),
    "BriaFibo2Transformer2DModel": fibo2,
    "BriaFibo2Transformer2DModel:lengths": lambda: fibo2(texts=(6, 3)),
    "BriaFibo2Transformer2DModel:references": lambda: fibo2(references=True),
}
