"""Binding of HunyuanVideo."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.layout import Grid, TokenLayout


class HunyuanVideoBinding(Binding):
    """HunyuanVideo: the video first, then text, whose padding the attention mask excludes."""

    patterns = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")

    def family(self, model: Any, pipe: Any) -> str:
        return "hunyuan"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (33, 45, 80)  # 129 frames of 720 x 1280

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        frames, height, width = call["hidden_states"].shape[-3:]
        patch, patch_t = model.config.patch_size, model.config.patch_size_t
        return TokenLayout.video(
            patched(frames, patch_t),
            patched(height, patch),
            patched(width, patch),
            text_after=call["encoder_hidden_states"].shape[1],
        )

    def skip_reason(self, name: str) -> str:
        return "text token refiner" if "token_refiner" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch).long(),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "encoder_attention_mask": zeros(model, batch, text).long() + 1,
            "pooled_projections": zeros(model, batch, config.pooled_projection_dim),
        }
        return call | ({"guidance": zeros(model, batch)} if config.guidance_embeds else {})
