"""Binding of Qwen-Image 2.1."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    told_native,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import scaled_tables
from diffaccel.layout import Grid, Segment, TokenLayout

SLOT = 4
"""Latent tokens that one image slot of the vision-language encoder stands for."""


class QwenImage21Binding(Binding):
    """Qwen-Image 2.1: text with the images to edit inside of it, then the image.

    What precedes the image is causal, block by block, in calls of its own. The image asks for all
    tokens, and once their keys are kept (KV cache) it is all that asks.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    attends_text_apart = True
    mixes_text = r".+"
    one_prompt = "its text is causal and not a part of the sequence by itself"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "qwen-image-2.1"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels, each token 16 x 16

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        *references, (frames, height, width) = call["img_shapes"][0]
        slots = call.read(call["img_mask"], lambda mask: mask[0].tolist())
        segments, place = [], 0
        for grid in references:
            start = slots.index(True, place)
            segments.append(Segment("text", start - place))
            segments.append(Segment("condition", prod(grid), (*grid,)))
            place = start + prod(grid) // SLOT
        count = frames * height * width
        if len(slots) - place < count // SLOT or not all(slots[-(count // SLOT) :]):
            raise LayoutUnknown("img_mask does not end with the image to denoise")
        segments.append(Segment("text", len(slots) - place - count // SLOT))
        segments.append(Segment("visual", count, (frames, height, width)))
        return TokenLayout(tuple(part for part in segments if part.length))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        height, width = latents
        mask = torch.arange(text + height * width // SLOT) >= text
        return {
            "hidden_states": zeros(model, batch, height * width, config.in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.context_in_dim),
            "timestep": zeros(model, batch),
            "img_shapes": [[(1, height, width)]] * batch,
            "img_mask": mask.expand(batch, -1),  # on the CPU, as the layout is read from it
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        # The rows of a table are positions from 0, then those below 0. Text has the same place on
        # all axes, and keeps it.
        rope = model.pos_embed
        stock = type(rope).forward

        def forward(img_shapes: Any, image_pad_mask: Tensor, device: Any) -> Tensor:
            plain = stock(rope, img_shapes, image_pad_mask, device)
            rows = len(rope.freqs[0])
            places = torch.arange(rows)
            places = torch.where(places < rows - 1024, places, places - rows)
            tables = scaled_tables(rope.freqs, rope.theta, axes, places)
            with exchanged(rope, "freqs", tables):
                scaled = stock(rope, img_shapes, image_pad_mask, device)
            return torch.where(image_pad_mask[:, None].to(plain.device), scaled, plain)

        return exchanged(rope, "forward", forward)
