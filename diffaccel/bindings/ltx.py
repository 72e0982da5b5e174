"""Binding of LTX-Video."""

from __future__ import annotations

from math import prod
from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, zeros
from diffaccel.layout import Grid, TokenLayout


class LTXVideoBinding(Binding):
    """LTX-Video: self-attention over the video alone, which arrives packed.

    The pipelines pass the grid of tokens as numbers. A call with precomputed coordinates instead
    (LTX condition pipeline) does not tell it and runs dense.
    """

    patterns = (
        (r"transformer_blocks\.\d+\.attn1", "self"),
        (r"transformer_blocks\.\d+\.attn2", "cross"),
    )
    text_length = 128
    batches_prompts = True

    def family(self, model: Any, pipe: Any) -> str:
        return "ltx"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (21, 16, 22)  # 161 frames of 512 x 704, each token 32 x 32 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        return TokenLayout.video(call["num_frames"], call["height"], call["width"])

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        frames, height, width = latents
        config = model.config
        return {
            "hidden_states": zeros(model, batch, prod(latents), config.in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.caption_channels),
            "timestep": zeros(model, batch),
            "encoder_attention_mask": zeros(model, batch, text) + 1,
            "num_frames": frames,
            "height": height,
            "width": width,
        }
