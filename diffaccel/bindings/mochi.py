"""Binding of Mochi 1."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.layout import Grid, TokenLayout


class MochiBinding(Binding):
    """Mochi 1: the video first, then its text; each sample in a call of its own.

    Its rotary frequencies are learned, one set for each head, and its positions keep the area of
    a picture constant already.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    batches_prompts = True
    cuts_text = True

    def family(self, model: Any, pipe: Any) -> str:
        return "mochi"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (28, 30, 53)  # 163 frames of 480 x 848

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        frames, height, width = call["hidden_states"].shape[-3:]
        patch = model.config.patch_size
        return TokenLayout.video(
            frames,
            patched(height, patch),
            patched(width, patch),
            text_after=call["encoder_hidden_states"].shape[1],
        )

    def skip_reason(self, name: str) -> str:
        return "text pooling" if "time_embed" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "timestep": zeros(model, batch),
            "encoder_attention_mask": zeros(model, batch, text).bool().logical_not(),
        }
