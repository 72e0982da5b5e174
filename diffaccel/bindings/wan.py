"""Binding of Wan 2.1 and 2.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, waves
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    patched,
    told_native,
    zeros,
)
from diffaccel.layout import Grid, TokenLayout


class WanBinding(Binding):
    """Wan 2.1 and 2.2: self-attention over the video alone; text is cross-attended.

    Each transformer of Wan 2.2 A14B is a denoiser of its own.
    """

    patterns = ((r"blocks\.\d+\.attn1", "self"), (r"blocks\.\d+\.attn2", "cross"))
    text_length = 512
    fills_text_up = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        settings = getattr(pipe, "config", {})
        config = model.config
        if settings.get("expand_timesteps") or config.in_channels == config.out_channels == 48:
            return "wan2.2-ti2v"
        has_experts = getattr(pipe, "transformer_2", None) is not None
        version = "wan2.2" if has_experts or settings.get("boundary_ratio") else "wan2.1"
        # Image to video: the first frame comes as further input channels or as image tokens.
        is_i2v = config.image_dim is not None or config.in_channels > config.out_channels
        return f"{version}-{'i2v' if is_i2v else 't2v'}"

    def longest_text(self, model: Any) -> int | None:
        # What precedes the last 512 tokens counts as a picture's.
        return None if model.config.image_dim is None else self.text_length

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        told = told_native(model)
        if told is not None:
            return told
        if self.family(model, None) == "wan2.2-ti2v":
            return (31, 22, 40)  # 121 frames of 704 x 1280, each token 32 x 32 pixels
        is_large = model.config.num_attention_heads >= 40
        return (21, 45, 80) if is_large else (21, 30, 52)  # 81 frames, 720 or 480 rows

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        sizes = call["hidden_states"].shape[-3:]
        return TokenLayout.video(*map(patched, sizes, model.config.patch_size))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_dim),
        }
        if config.image_dim is not None:  # CLIP of a picture of 224 x 224
            call["encoder_hidden_states_image"] = zeros(model, batch, 257, config.image_dim)
        return call

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the tables (positions, D): cosines and sines of all axes side by side.
        rope = model.rope
        before = rope.freqs_cos, rope.freqs_sin
        parts = [table.split((rope.t_dim, rope.h_dim, rope.w_dim), 1) for table in before]
        places = torch.arange(len(before[0]), dtype=torch.float64, device=before[0].device)
        scaled: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, axis in enumerate(axes):
            tables = parts[0][number], parts[1][number]
            if axis is not None:
                tables = waves(places, tables[0].shape[1], 10_000.0, axis)
            for kept, table in zip(scaled, tables, strict=True):
                kept.append(table)
        rope.freqs_cos, rope.freqs_sin = (torch.cat(tables, 1) for tables in scaled)
        try:
            yield
        finally:
            rope.freqs_cos, rope.freqs_sin = before
