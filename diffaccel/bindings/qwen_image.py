"""Binding of Qwen-Image."""

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
    ModelCall,
    target_and_references,
    zeros,
)
from diffaccel.bindings.passed_tables import amplitudes
from diffaccel.bindings.rotary import phases
from diffaccel.bindings.tables import output_changed
from diffaccel.layout import Grid, Segment, TokenLayout


class QwenImageBinding(Binding):
    """Qwen-Image: text first, then the image, then the images to edit."""

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("encoder_hidden_states", "hidden_states")
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "qwen"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (1, 83, 83)  # 1328 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        # One entry per sample; the model itself takes the first for all. An entry is a list of
        # (frames, height, width), or a single one (ControlNet pipelines).
        images = call["img_shapes"][0]
        images = images if isinstance(images, list) else [images]
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((text, *target_and_references(images)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        rows, columns = (side // 2 for side in latents)
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, rows * columns, config.in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.joint_attention_dim),
            "timestep": zeros(model, batch),
            "img_shapes": [[(1, rows, columns)]] * batch,
        }
        return call | ({"guidance": zeros(model, batch)} if config.guidance_embeds else {})

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.pos_embed

        def change(args: tuple, kwargs: dict[str, Any], found: Any) -> tuple[Tensor, Tensor]:
            images, text = found
            given = kwargs["video_fhw"] if "video_fhw" in kwargs else args[0]
            given = given[0] if isinstance(given, list) else given
            grids = given if isinstance(given, list) else [given]
            scaled = [
                _rescaled(part.unflatten(0, grid), rope, starts, axes)
                for part, grid, starts in zip(
                    images.split([prod(grid) for grid in grids]),
                    grids,
                    _starts(grids, rope, model.config.use_layer3d_rope),
                    strict=True,
                )
            ]
            # Text lies behind the images on all axes, and stays there.
            dims = torch.tensor([dim // 2 for dim in rope.axes_dim], device=text.device)
            factor = amplitudes(axes, text).repeat_interleave(dims)
            return torch.cat(scaled), (text * factor).to(text)

        return output_changed(rope, change)


def _starts(grids: list[Grid], rope: Any, has_layers: bool) -> list[Grid]:
    """Returns the first frame, row and column of each image, as Qwen-Image counts."""
    starts = []
    for index, (_, height, width) in enumerate(grids):
        # Images are numbered; in Qwen-Image-Layered the one to take apart is number -1.
        frame = -1 if has_layers and index == len(grids) - 1 else index
        row, column = (side // 2 - side if rope.scale_rope else 0 for side in (height, width))
        starts.append((frame, row, column))
    return starts


def _rescaled(
    table: Tensor, rope: Any, starts: Grid, axes: tuple[Axis | None, Axis | None, Axis | None]
) -> Tensor:
    """Returns the rotations (N, D / 2) of one image (frames, height, width, D / 2), scaled."""
    parts = list(table.split([dim // 2 for dim in rope.axes_dim], -1))
    for number, (dim, axis, start) in enumerate(zip(rope.axes_dim, axes, starts, strict=True)):
        if axis is None:
            continue
        places = torch.arange(start, start + table.shape[number], device=table.device)
        shape = [1, 1, 1, dim // 2]
        shape[number] = len(places)
        rows = phases(places, dim, rope.theta, axis).to(table.dtype)
        parts[number] = rows.view(shape).expand_as(parts[number])
    return torch.cat(parts, -1).flatten(0, 2)
