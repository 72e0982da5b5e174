"""Binding of FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, waves
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class FluxBinding(Binding):
    """FLUX.1: text first, then the image, then reference images (Kontext).

    Latents arrive packed; only the position ids, (tokens, 3) with (image, row, column), tell the
    grid. They are read once for each tensor, one wait for the device in a run.
    """

    patterns = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("encoder_hidden_states", "hidden_states")
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "flux"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        images = call.read(call["img_ids"], image_grids)
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((text, *target_and_references(images)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        rows, columns = (side // 2 for side in latents)
        ids = torch.cartesian_prod(*(torch.arange(float(side)) for side in (1, rows, columns)))
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, rows * columns, config.in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.joint_attention_dim),
            "pooled_projections": zeros(model, batch, config.pooled_projection_dim),
            "timestep": zeros(model, batch),
            "img_ids": ids,  # on the CPU, as the layout is read from their values
            "txt_ids": torch.zeros(text, 3),
        }
        return call | ({"guidance": zeros(model, batch)} if config.guidance_embeds else {})

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the function from position ids (N, 3) to cosines and sines (N, D).
        embedding = model.pos_embed

        def forward(self: Any, ids: Tensor) -> tuple[Tensor, ...]:
            tables = [
                waves(ids[:, number].cpu().double(), dim, self.theta, axis)
                for number, (dim, axis) in enumerate(zip(self.axes_dim, axes, strict=True))
            ]
            return tuple(torch.cat(parts, 1).to(ids.device) for parts in zip(*tables, strict=True))

        embedding.forward = MethodType(forward, embedding)
        try:
            yield
        finally:
            del embedding.forward


def image_grids(ids: Tensor) -> list[tuple[int, int, int]]:
    """Reads the grids of consecutive images from their FLUX position ids.

    Ids may be scaled (position interpolation) or rounded (bf16 beyond 256): only their order
    counts.

    Args:
        ids: (tokens, 3) or (B, tokens, 3): image index, row, column of each token.

    Returns:
        (1, height, width) of each image; the first is the one to denoise.
    """
    rows = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    starts = [0, *(_changes(rows[:, 0])), len(rows)]
    images = [rows[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
    return [(1, *_raster(image)) for image in images]


def _raster(image: Tensor) -> tuple[int, int]:
    """Returns (height, width) of one image's ids, which must lie in raster order."""
    width = next(iter(_changes(image[:, 1])), len(image))
    if len(image) % width == 0:
        grid = image.reshape(-1, width, 3)
        is_row = (grid[..., 1] == grid[:, :1, 1]).all()
        is_column = (grid[..., 2] == grid[:1, :, 2]).all()
        if is_row and is_column:
            return len(image) // width, width
    raise LayoutUnknown("img_ids do not describe images in raster order")


def _changes(values: Tensor) -> list[int]:
    """Returns the positions at which a value differs from the one before."""
    return (values[1:] != values[:-1]).nonzero().flatten().add(1).tolist()
