"""Binding of EasyAnimate 5."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, on_grid, waves
from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.bindings.exchange import exchanged_forward
from diffaccel.layout import Grid, TokenLayout

Axes = tuple[Axis | None, Axis | None, Axis | None]


class EasyAnimateBinding(Binding):
    """EasyAnimate: text of one or two encoders first, then the video.

    What is inpainted or controls comes as further channels.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    batches_prompts = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "easyanimate"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        sides = (side // config.patch_size for side in (config.sample_height, config.sample_width))
        return (13, *sides)  # 49 frames

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        frames, height, width = call["hidden_states"].shape[-3:]
        texts = (call["encoder_hidden_states"], call.arguments.get("encoder_hidden_states_t5"))
        patch = model.config.patch_size
        return TokenLayout.video(
            frames,
            patched(height, patch),
            patched(width, patch),
            text_before=sum(text.shape[1] for text in texts if text is not None),
        )

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, config.out_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
        }
        further = config.in_channels - config.out_channels
        if further:
            call["inpaint_latents"] = zeros(model, batch, further, *latents)
        return call

    def scaled_rope(self, model: Any, axes: Axes) -> AbstractContextManager[None]:
        return exchanged_forward(model.rope_embedding, _scaled_forward(axes))


def _scaled_forward(axes: Axes) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a forward of EasyAnimate's position embedding whose axes are scaled."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        patch, dim = self.patch_size, self.rope_dim
        frames, *sides = hidden_states.shape[-3:]
        sides = [side // patch for side in sides]
        # Rows and columns span those of 480 x 720, whatever their number.
        begins, ends = self.get_resize_crop_region_for_grid(sides, 90 // patch, 60 // patch)
        spans = [(0.0, 1.0)]
        for side, begin, end in zip(sides, begins, ends, strict=True):
            last = end * (side - 1) / side
            spans.append((begin, (last - begin) / max(side - 1, 1) or 1.0))
        tables = []
        dims = (dim // 4, dim // 8 * 3, dim // 8 * 3)
        for size, width, axis, (start, step) in zip(
            (frames, *sides), dims, axes, spans, strict=True
        ):
            places = torch.arange(size, dtype=torch.float64, device=hidden_states.device)
            tables.append(waves(places, width, 10_000.0, axis, step=step, start=start))
        cosines, sines = zip(*tables, strict=True)
        return on_grid(list(cosines)), on_grid(list(sines))

    return forward
