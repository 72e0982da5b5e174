"""Z-Image: lists of samples, images and texts filled up to multiples of 32 tokens."""

from __future__ import annotations

from typing import Any

import diffusers

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise

GRID = (1, 5, 13)
IMAGE = (Segment("visual", 65, GRID), Segment("condition", 31))
EDITED = (Segment("condition", 12, (1, 3, 4)), Segment("condition", 20))


def transformer(**config: Any) -> Any:
    """One noise refiner, two layers."""
    return built(
        diffusers.ZImageTransformer2DModel, in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
        **config,
    )  # fmt: skip


def z_image() -> TinyModel:
    """Z-Image: one text needs 64 tokens, the other one 32."""
    return TinyModel(
        transformer(),
        {
            "x": [noise(4, 1, 10, 26), noise(4, 1, 10, 26, seed=2)], "t": noise(2, seed=4).abs(),
            "cap_feats": [noise(40, 16, seed=3), noise(6, 16, seed=5)],
        },
        layouts={
            r"noise_refiner\.\d\.attention": TokenLayout(IMAGE),
            r"layers\.\d\.attention": TokenLayout((*IMAGE, Segment("text", 64))),
        },
        grid=GRID, latents="x", axes="cfhw", predicted="bcfhw", skipped=1, latent_size=(10, 26),
        text=6,
    )  # fmt: skip


def omni() -> TinyModel:
    """Omni: an image to edit before the one to denoise, its SigLIP features at the end."""
    images = (*EDITED, *IMAGE)
    joint = (Segment("text", 64), *images, Segment("condition", 64))
    tiny = z_image()
    tiny.model = transformer(siglip_feat_dim=8)
    tiny.arguments |= {
        "x": [[noise(4, 1, 6, 8, seed=6), x] for x in tiny.arguments["x"]],
        "cap_feats": [[noise(6, 16, seed=3), noise(5, 16)], [noise(3, 16), noise(4, 16, seed=5)]],
        "siglip_feats": [[noise(2, 3, 8), None]] * 2,
        "image_noise_mask": [[0, 1]] * 2,
    }
    tiny.layouts = {
        r"noise_refiner\.\d\.attention": TokenLayout(images),
        r"layers\.\d\.attention": TokenLayout(joint),
    }
    tiny.skipped = 2
    return tiny


MODELS = {"ZImageTransformer2DModel": z_image, "ZImageTransformer2DModel:omni": omni}
