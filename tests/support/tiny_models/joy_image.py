"""JoyImage: the image, the images to edit, then text."""

from __future__ import annotations

from typing import Any

import diffusers

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise

VISUAL = Segment("visual", 65, (1, 5, 13))
TEXT = Segment("text", 6)


def transformer(model_class: Any) -> Any:
    """Two blocks."""
    return built(
        model_class, in_channels=4, out_channels=4, hidden_size=24, num_attention_heads=2,
        text_dim=16, num_layers=2, rope_dim_list=[4, 4, 4],
    )  # fmt: skip


def edit(references: bool = False) -> TinyModel:
    """Edit: the image is the last item, and comes first in the sequence."""
    images = 1 + 2 * references
    others = (Segment("condition", 65, (1, 5, 13)),) * (images - 1)
    return TinyModel(
        transformer(diffusers.JoyImageEditTransformer3DModel),
        {
            "hidden_states": noise(2, images, 4, 1, 10, 26), "timestep": noise(2, seed=4).abs(),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
        },
        layouts={r"double_blocks\.\d\.attn": TokenLayout((VISUAL, *others, TEXT))},
        grid=(1, 5, 13), axes="bicfhw", latent_size=(10, 26), text=6,
    )  # fmt: skip


def edit_plus() -> TinyModel:
    """Edit Plus: one sample edits an image of 12 tokens, the other one of 6."""
    return TinyModel(
        transformer(diffusers.JoyImageEditPlusTransformer3DModel),
        {
            "hidden_states": noise(2, 77, 4, 1, 2, 2), "timestep": noise(2, seed=4).abs(),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "encoder_hidden_states_mask": lengths(6, 6, 4).float(),
            "shape_list": [[(1, 5, 13), (1, 3, 4)], [(1, 5, 13), (1, 2, 3)]],
        },
        layouts={
            r"double_blocks\.\d\.attn": TokenLayout((VISUAL, Segment("condition", 12), TEXT))
        },
        grid=(1, 5, 13), latent_size=(10, 26), text=6,
    )  # fmt: skip


MODELS = {
    "JoyImageEditTransformer3DModel": edit,
    "JoyImageEditTransformer3DModel:references": lambda: edit(references=True),
    "JoyImageEditPlusTransformer3DModel": edit_plus,
}
