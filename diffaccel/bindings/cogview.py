"""Bindings of CogView3-Plus and CogView4."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, image_grid, zeros
from diffaccel.layout import Grid, TokenLayout


class CogView4Binding(Binding):
    """CogView4: text first, then the image.

    Its rotary positions are spread over the same range whatever the size: there is nothing to
    scale. The control pipeline adds channels, no tokens.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")

    def family(self, model: Any, pipe: Any) -> str:
        return "cogview4"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        return (1, *(config.sample_size // config.patch_size,) * 2)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = image_grid(call["hidden_states"], model.config.patch_size)
        text = call["encoder_hidden_states"].shape[1]
        return TokenLayout.video(*grid, text_before=text)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "timestep": zeros(model, batch),
            "original_size": zeros(model, batch, 2),
            "target_size": zeros(model, batch, 2),
            "crop_coords": zeros(model, batch, 2),
        }


class CogView3PlusBinding(CogView4Binding):
    """CogView3-Plus: the same order; both prompts in one batch, and a table of positions."""

    batches_prompts = True

    def family(self, model: Any, pipe: Any) -> str:
        return "cogview3"
