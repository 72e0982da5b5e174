"""Binding of Cosmos 1, 2 and 2.5."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, angles, on_grid
from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.bindings.exchange import exchanged_forward
from diffaccel.layout import Grid, TokenLayout

Axes = tuple[Axis | None, Axis | None, Axis | None]


class CosmosBinding(Binding):
    """Cosmos: self-attention over the video alone; text, and a picture, are cross-attended.

    Frames that condition take the place of noisy ones; controls are added to the blocks.
    """

    patterns = (
        (r"transformer_blocks\.\d+\.attn1", "self"),
        (r"transformer_blocks\.\d+\.attn2", "cross"),
    )
    text_length = 512
    fills_text_up = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "cosmos"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        if model.config.extra_pos_embed_type == "learnable":
            return (16, 44, 80)  # Cosmos 1: 121 frames of 704 x 1280
        if model.config.in_channels == model.config.out_channels:
            return (1, 48, 85)  # Cosmos 2 for images: 768 x 1360
        return (24, 44, 80)  # 93 frames of 704 x 1280

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        sizes = call["hidden_states"].shape[-3:]
        return TokenLayout.video(*map(patched, sizes, model.config.patch_size))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        width = config.text_embed_dim
        if config.use_crossattn_projection:
            width = config.crossattn_proj_in_channels
        states: Any = zeros(model, batch, text, width)
        if config.img_context_dim_in:
            sizes = config.img_context_num_tokens, config.img_context_dim_in
            states = states, zeros(model, batch, *sizes)
        call: dict[str, Any] = {
            "hidden_states": zeros(model, batch, config.out_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": states,
        }
        if config.img_context_dim_in:
            call["attention_mask"] = None
        if config.in_channels > config.out_channels:
            channels = config.in_channels - config.out_channels
            call["condition_mask"] = zeros(model, batch, channels, *latents)
        if config.concat_padding_mask:
            call["padding_mask"] = zeros(model, 1, 1, *(8 * side for side in latents[1:]))
        return call

    def scaled_rope(self, model: Any, axes: Axes) -> AbstractContextManager[None]:
        return exchanged_forward(model.rope, _scaled_forward(axes))


def _scaled_forward(axes: Axes) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a forward of Cosmos' position embedding whose axes are scaled."""

    def forward(self: Any, hidden_states: Tensor, fps: int | None = None) -> tuple[Tensor, Tensor]:
        sizes = [s // p for s, p in zip(hidden_states.shape[-3:], self.patch_size, strict=True)]
        seconds = 1.0 if fps is None else self.base_fps / fps
        kinds = (
            (self.dim_t, self.t_ntk_factor, seconds),
            (self.dim_h, self.h_ntk_factor, 1.0),
            (self.dim_w, self.w_ntk_factor, 1.0),
        )
        cosines, sines = [], []
        for size, axis, (dim, factor, step) in zip(sizes, axes, kinds, strict=True):
            options: Any = {"dtype": torch.float64, "device": hidden_states.device}
            order = torch.arange(0, dim, 2, **options) / dim
            frequencies = step * (10_000.0 * factor) ** -order
            found = angles(torch.arange(size, **options), frequencies, axis)
            amplitude = 1.0 if axis is None else axis.amplitude
            cosines.append((amplitude * found.cos()).float())
            sines.append((amplitude * found.sin()).float())
        cosine, sine = on_grid(cosines), on_grid(sines)
        return torch.cat([cosine] * 2, -1), torch.cat([sine] * 2, -1)

    return forward
