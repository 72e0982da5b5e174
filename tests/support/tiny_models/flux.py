"""FLUX and what descends from it: packed images, text first."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def image_ids(height: int, width: int, index: int = 0, last: int | None = None) -> torch.Tensor:
    """Position ids (tokens, 3) of one image, (tokens, 4) with a last number for all of them."""
    axes = [torch.tensor([float(index)]), torch.arange(float(height)), torch.arange(float(width))]
    return torch.cartesian_prod(*axes, *([] if last is None else [torch.tensor([float(last)])]))


def diagonal_ids(count: int) -> torch.Tensor:
    """Position ids (tokens, 3) of text that stands on a diagonal."""
    places = torch.arange(float(count))
    return torch.stack([places * 0, places, places], 1)


def counted_ids(count: int) -> torch.Tensor:
    """Position ids (tokens, 4) of text whose tokens are counted along the last axis."""
    return torch.cat([torch.zeros(count, 3), torch.arange(float(count))[:, None]], 1)


TEXT = Segment("text", 6)
IMAGE = Segment("visual", 65, (1, 5, 13))
REFERENCE = Segment("condition", 12, (1, 3, 4))


def flux(references: bool = False) -> TinyModel:
    """FLUX.1: two double and two single blocks; Kontext appends an image to edit."""
    model = built(
        diffusers.FluxTransformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    ids, segments = image_ids(5, 13), [TEXT, IMAGE]
    if references:
        ids, segments = torch.cat([ids, image_ids(3, 4, index=1)]), [TEXT, IMAGE, REFERENCE]
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, len(ids), 16),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "pooled_projections": noise(2, 32, seed=3), "timestep": noise(2, seed=4),
            "img_ids": ids, "txt_ids": torch.zeros(6, 3),
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout(tuple(segments))},
        grid=(1, 5, 13), latent_size=(10, 26), text=6,
    )  # fmt: skip


def _flux2(ids: torch.Tensor, segments: list[Segment], **options: Any) -> TinyModel:
    model = built(
        diffusers.Flux2Transformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=32, timestep_guidance_channels=32,
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, len(ids), 16),
            "encoder_hidden_states": noise(2, 6, 32, seed=2), "timestep": noise(2, seed=4),
            "guidance": noise(2, seed=5), "img_ids": ids.expand(2, -1, -1),
            "txt_ids": counted_ids(6).expand(2, -1, -1),
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout(tuple(segments))},
        grid=(1, 5, 13), latent_size=(10, 26), text=6, **options,
    )  # fmt: skip


def flux2(references: bool = False) -> TinyModel:
    """FLUX.2: two double and two single blocks; an image to edit is numbered 10."""
    ids = image_ids(5, 13, last=0)
    if not references:
        return _flux2(ids, [TEXT, IMAGE])
    return _flux2(torch.cat([ids, image_ids(3, 4, 10, last=0)]), [TEXT, IMAGE, REFERENCE])


def flux2_cached(first_step: bool) -> TinyModel:
    """Klein with cached references, which come before the image, and attend to themselves."""
    ids = torch.cat([image_ids(3, 4, 10, last=0), image_ids(5, 13, last=0)])
    tiny = _flux2(ids, [TEXT, REFERENCE, IMAGE], start=12, predicted_start=0)
    for block in tiny.model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in tiny.model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    tiny.arguments |= {"kv_cache_mode": "extract", "num_ref_tokens": 12}
    if not first_step:
        with torch.no_grad():
            cache = tiny.model(**tiny.arguments, return_dict=False)[1]
        tiny.arguments |= {"kv_cache_mode": "cached", "kv_cache": cache, "num_ref_tokens": 0}
        for name in ("hidden_states", "img_ids"):
            tiny.arguments[name] = tiny.arguments[name][:, 12:]
        tiny.start = 0
    return tiny


def flux3(references: bool = False) -> TinyModel:
    """FLUX.3: one block for each kind of token, two joint ones; scaled ids, an image to edit."""
    model = built(
        diffusers.Flux3Transformer2DModel, in_channels=16, cond_in_channels=16, num_layers=1,
        num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    scale, segments = torch.tensor([1, 0.5, 0.5, 1]), [TEXT, IMAGE]
    arguments = {
        "hidden_states": noise(2, 65, 16), "encoder_hidden_states": noise(2, 6, 32, seed=2),
        "timestep": noise(2, seed=4), "img_ids": image_ids(5, 13, last=0) * scale,
        "txt_ids": counted_ids(6),
    }  # fmt: skip
    if references:
        segments.append(REFERENCE)
        arguments["image_cond_hidden_states"] = noise(2, 12, 16, seed=6)
        arguments["image_cond_ids"] = image_ids(3, 4, last=-1) * scale
    return TinyModel(
        model,
        arguments,
        layouts={
            r"single_transformer_blocks\.\d\.attn": TokenLayout(tuple(segments)),
            r"mode_blocks\.image\.0\.attn": TokenLayout((IMAGE,)),
        },
        grid=(1, 5, 13), skipped=2, latent_size=(10, 26), text=6,
    )  # fmt: skip


def chroma(floats: bool = False) -> TinyModel:
    """Chroma: FLUX with text of two lengths, behind a mask, of bools or of floats."""
    model = built(
        diffusers.ChromaTransformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    mask = torch.cat([lengths(6, 6, 4), lengths(65, 65, 65)], 1)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 65, 16), "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "timestep": noise(2, seed=4), "img_ids": image_ids(5, 13),
            "txt_ids": torch.zeros(6, 3),
            "attention_mask": mask.float() if floats else mask,
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout((TEXT, IMAGE))},
        grid=(1, 5, 13), latent_size=(10, 26), text=6,
    )  # fmt: skip


def krea2() -> TinyModel:
    """Krea 2: features of three layers for each word, text of two lengths, grouped heads."""
    model = built(
        diffusers.Krea2Transformer2DModel, in_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 65, 16), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 3, 16, seed=2),
            "position_ids": torch.cat([torch.zeros(6, 3), image_ids(5, 13)]),
            "encoder_attention_mask": lengths(6, 6, 4),
        },
        layouts={r"transformer_blocks\.\d\.attn": TokenLayout((TEXT, IMAGE))},
        grid=(1, 5, 13), skipped=2, latent_size=(10, 26), text=6,
    )  # fmt: skip


def longcat_image(references: bool = False) -> TinyModel:
    """LongCat-Image: text on a diagonal, at whose end the image and the one to edit begin."""
    model = built(
        diffusers.LongCatImageTransformer2DModel, in_channels=16, num_layers=2,
        num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    place = torch.tensor([0.0, 6.0, 6.0])
    ids, segments = image_ids(5, 13, 1) + place, [TEXT, IMAGE]
    if references:
        ids, segments = torch.cat([ids, image_ids(3, 4, 2) + place]), [TEXT, IMAGE, REFERENCE]
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, len(ids), 16), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "img_ids": ids, "txt_ids": diagonal_ids(6),
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout(tuple(segments))},
        grid=(1, 5, 13), latent_size=(10, 26), text=6,
    )  # fmt: skip


def ovis_image() -> TinyModel:
    """Ovis-Image: text on a diagonal, the image from the same corner."""
    model = built(
        diffusers.OvisImageTransformer2DModel, in_channels=16, out_channels=16, num_layers=2,
        num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 65, 16), "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "timestep": noise(2, seed=4), "img_ids": image_ids(5, 13), "txt_ids": diagonal_ids(6),
        },
        layouts={r"(single_)?transformer_blocks\.\d\.attn": TokenLayout((TEXT, IMAGE))},
        grid=(1, 5, 13), latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "FluxTransformer2DModel": flux,
    "FluxTransformer2DModel:references": lambda: flux(references=True),
    "Flux2Transformer2DModel": flux2,
    "Flux2Transformer2DModel:references": lambda: flux2(references=True),
    "Flux2Transformer2DModel:caching": lambda: flux2_cached(first_step=True),
    "Flux2Transformer2DModel:cached": lambda: flux2_cached(first_step=False),
    "Flux3Transformer2DModel": flux3,
    "Flux3Transformer2DModel:references": lambda: flux3(references=True),
    "ChromaTransformer2DModel": chroma,
    "ChromaTransformer2DModel:floats": lambda: chroma(floats=True),
    "Krea2Transformer2DModel": krea2,
    "LongCatImageTransformer2DModel": longcat_image,
    "LongCatImageTransformer2DModel:references": lambda: longcat_image(references=True),
    "OvisImageTransformer2DModel": ovis_image,
}
