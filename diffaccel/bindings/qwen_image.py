"""Binding of Qwen-Image."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    target_and_references,
    zeros,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class QwenImageBinding(Binding):
    """Qwen-Image: text first, then the image, then the images to edit."""

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("encoder_hidden_states", "hidden_states")

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
