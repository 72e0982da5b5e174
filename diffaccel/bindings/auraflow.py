"""Binding of AuraFlow."""

from __future__ import annotations

from math import isqrt
from typing import Any

from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    image_grid,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class AuraFlowBinding(Binding):
    """AuraFlow: learned register tokens, text, then the image."""

    patterns = ((r"(joint|single)_transformer_blocks\.\d+\.attn", "joint"),)
    stacks = ("joint_transformer_blocks", "single_transformer_blocks")
    mixes_text = r"single_transformer_blocks\..+"
    block_outputs = ("encoder_hidden_states", "hidden_states")
    batches_prompts = True

    def family(self, model: Any, pipe: Any) -> str:
        return "auraflow"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        side = isqrt(model.config.pos_embed_max_size)  # the table of positions is square
        return told_native(model) or (1, side, side)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = image_grid(call["hidden_states"], model.config.patch_size)
        registers = Segment("condition", model.register_tokens.shape[1])
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((registers, text, *target_and_references([grid])))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.joint_attention_dim),
            "timestep": zeros(model, batch),
        }
