"""Binding of HunyuanImage 2.1 and its refiner."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    patched,
    told_native,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import grid_waves
from diffaccel.layout import Grid, TokenLayout


class HunyuanImageBinding(Binding):
    """HunyuanImage: the image, then glyphs (ByT5) and text, whose padding the mask excludes."""

    patterns = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    one_prompt = "its text comes from two encoders"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "hunyuan-image"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 2048 pixels, each token 32 x 32

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        latents, patches = call["hidden_states"], model.config.patch_size
        text = call["encoder_hidden_states"].shape[1]
        glyphs = call.arguments.get("encoder_hidden_states_2")
        if glyphs is not None and model.context_embedder_2 is not None:
            text += glyphs.shape[1]
        sides = map(patched, latents.shape[-len(patches) :], patches)
        return TokenLayout.video(*_three(sides), text_after=text)

    def skip_reason(self, name: str) -> str:
        return "text token refiner" if "token_refiner" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        sizes = _three(latents)[-len(config.patch_size) :]
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *sizes),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "encoder_attention_mask": zeros(model, batch, text).long() + 1,
        }
        if config.guidance_embeds:
            call["guidance"] = zeros(model, batch)
        if config.use_meanflow:
            call["timestep_r"] = zeros(model, batch)
        return call

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope, count = model.rope, len(model.config.patch_size)

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            sizes = [
                side // patch
                for side, patch in zip(hidden_states.shape[2:], rope.patch_size, strict=True)
            ]
            tables = grid_waves([0] * count, sizes, rope.rope_dim, rope.theta, axes[-count:])
            cosine, sine = (table.to(hidden_states.device) for table in tables)
            return cosine, sine

        return exchanged(rope, "forward", forward)


def _three(sizes: Any) -> tuple[int, int, int]:
    """Fills (height, width) up to (frames, height, width)."""
    frames, height, width = (1, *sizes)[-3:]
    return frames, height, width
