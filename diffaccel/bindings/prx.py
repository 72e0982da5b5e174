"""Binding of PRX."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    image_grid,
    told_native,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import rotations
from diffaccel.layout import Grid, TokenLayout


class PRXBinding(Binding):
    """PRX: keys of the text, then those of the image, which alone asks."""

    patterns = ((r"blocks\.\d+\.attention", "joint"),)
    batches_prompts = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "prx"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        # 512 pixels behind an autoencoder, which patches of one element tell to be the deeper one.
        size = 1024 if config.in_channels == 3 else 16 if config.patch_size == 1 else 64
        return told_native(model) or (1, *(size // config.patch_size,) * 2)

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
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.context_in_dim),
            "attention_mask": zeros(model, batch, text).bool().logical_not(),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.pe_embedder

        def forward(ids: Tensor) -> Tensor:
            return rotations(ids, rope.axes_dim, rope.theta, axes[1:]).unsqueeze(1)

        return exchanged(rope, "forward", forward)
