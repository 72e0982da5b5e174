"""Binding of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, image_grid, zeros
from diffaccel.layout import Grid, TokenLayout


class SD3Binding(Binding):
    """Stable Diffusion 3 and 3.5: the image first, then text; `attn2` sees the image alone."""

    patterns = (
        (r"transformer_blocks\.\d+\.attn", "joint"),
        (r"transformer_blocks\.\d+\.attn2", "self"),
    )
    block_outputs = ("encoder_hidden_states", "hidden_states")
    batches_prompts = True

    def family(self, model: Any, pipe: Any) -> str:
        return "sd3"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        size = model.config.sample_size
        return None if size is None else (1, *(size // model.config.patch_size,) * 2)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = image_grid(call["hidden_states"], model.config.patch_size)
        text = call["encoder_hidden_states"].shape[1] if layer.kind == "joint" else 0
        return TokenLayout.video(*grid, text_after=text)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.joint_attention_dim),
            "pooled_projections": zeros(model, batch, config.pooled_projection_dim),
            "timestep": zeros(model, batch),
        }
