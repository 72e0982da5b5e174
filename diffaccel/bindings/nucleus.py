"""Binding of Nucleus-Image."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, told_native, zeros
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import scaled_tables
from diffaccel.layout import Grid, TokenLayout


class NucleusBinding(Binding):
    """Nucleus-MoE: keys of the image, which alone asks, then those of the text."""

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "nucleus"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        # One entry per sample, or one for all; the model itself takes the first.
        images = call["img_shapes"]
        frames, height, width = images[0] if isinstance(images, list) else images
        text = call["encoder_hidden_states"].shape[1]
        return TokenLayout.video(frames, height, width, text_after=text)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        rows, columns = (side // config.patch_size for side in latents)
        return {
            "hidden_states": zeros(model, batch, rows * columns, config.in_channels),
            "img_shapes": [(1, rows, columns)] * batch,
            "encoder_hidden_states": zeros(model, batch, text, config.joint_attention_dim),
            "timestep": zeros(model, batch),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        # What the model remembers of a size is unscaled, and passed over. Text keeps its places.
        rope = model.pos_embed
        dims = [dim // 2 for dim in rope.axes_dim]
        rows = torch.arange(len(rope.pos_freqs))
        places = {"pos_freqs": rows, "neg_freqs": rows - len(rows)}
        tables = {
            name: torch.cat(
                scaled_tables(getattr(rope, name).split(dims, 1), rope.theta, axes, rows), 1
            )
            for name, rows in places.items()
        }
        twin = SimpleNamespace(**tables, axes_dim=rope.axes_dim, scale_rope=rope.scale_rope)
        compute = type(rope)._compute_video_freqs.__wrapped__

        def video_freqs(*sizes: Any) -> Tensor:
            return compute(twin, *sizes)

        return exchanged(rope, "_compute_video_freqs", video_freqs)
