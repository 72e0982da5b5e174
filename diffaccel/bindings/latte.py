"""Binding of Latte."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import TEMPORAL, AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.layout import Grid, TokenLayout


class LatteBinding(Binding):
    """Latte: self-attention over each frame, the frames being further rows of the batch."""

    patterns = (
        (r"transformer_blocks\.\d+\.attn1", "self"),
        (r"transformer_blocks\.\d+\.attn2", "cross"),
    )
    is_chain = False  # blocks of attention along time lie between those of the frames
    batches_prompts = True
    text_length = 120

    def family(self, model: Any, pipe: Any) -> str:
        return "latte"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        side = model.config.sample_size // model.config.patch_size
        return (1, side, side)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        height, width = call["hidden_states"].shape[-2:]
        patch = model.config.patch_size
        return TokenLayout.image(patched(height, patch), patched(width, patch))

    def skip_reason(self, name: str) -> str:
        return TEMPORAL if name.startswith("temporal") else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.caption_channels),
        }
