"""Bindings of JoyImage Edit and Edit Plus."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    patched,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import grid_waves
from diffaccel.layout import Grid, Segment, TokenLayout


class JoyImageEditBinding(Binding):
    """JoyImage Edit: the image, the images to edit, then text.

    Latents are (B, C, F, H, W), or (B, items, C, F, H, W) with the image as the last item, which
    the model takes to the front.
    """

    patterns = ((r"double_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "joy-image"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        latents = call["hidden_states"]
        frames, height, width = map(patched, latents.shape[-3:], model.config.patch_size)
        items = latents.shape[1] if latents.ndim == 6 else 1
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        images = target_and_references([(frames, height, width)] * items)
        return TokenLayout((*images, text))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, 1, config.in_channels, 1, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_dim),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        stock, config = model.get_rotary_pos_embed, model.config

        def rotary(vis_rope_size: list[int], txt_rope_size: int | None = None) -> Any:
            _, text = stock(vis_rope_size, txt_rope_size)
            image = grid_waves([0] * 3, vis_rope_size, _dims(config), config.theta, axes)
            return image, text

        return exchanged(model, "get_rotary_pos_embed", rotary)


class JoyImageEditPlusBinding(JoyImageEditBinding):
    """JoyImage Edit Plus: the same order, images of any sizes packed as patches.

    `shape_list` tells the grids of each sample, the image to denoise first. What fills samples up
    to one length counts as condition tokens.
    """

    batches_prompts = True

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        targets = {tuple(images[0]) for images in call["shape_list"]}
        if len(targets) > 1:
            raise LayoutUnknown("the images of the samples have different sizes")
        (grid,) = targets
        segments = (
            Segment("visual", prod(grid), grid),
            Segment("condition", call["hidden_states"].shape[1] - prod(grid)),
            Segment("text", call["encoder_hidden_states"].shape[1]),
        )
        return TokenLayout(tuple(part for part in segments if part.length))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        grid = tuple(map(patched, (1, *latents), config.patch_size))
        patch = (config.in_channels, *config.patch_size)
        call = super().example_call(model, latents, text, batch)
        return call | {
            "hidden_states": zeros(model, batch, prod(grid), *patch),
            "encoder_hidden_states_mask": zeros(model, batch, text).long() + 1,
            "shape_list": [[grid]] * batch,
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        config = model.config

        def rotary(start: Grid, stop: Grid) -> tuple[Tensor, Tensor]:
            sizes = [last - first for first, last in zip(start, stop, strict=True)]
            return grid_waves(start, sizes, _dims(config), config.theta, axes)

        return exchanged(model, "_get_rotary_pos_embed_for_range", rotary)


def _dims(config: Any) -> list[int]:
    return config.rope_dim_list or [config.hidden_size // config.num_attention_heads // 3] * 3
