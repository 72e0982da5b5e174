"""Bindings of Lumina-Next and Lumina-Image 2.0."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    image_grid,
    reversed_time,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.passed_tables import argument_changed, rescaled_rows
from diffaccel.bindings.rotary import scaled_tables
from diffaccel.layout import Grid, TokenLayout


class LuminaNextBinding(Binding):
    """Lumina-Next: self-attention over the image alone, under a mask that excludes nothing."""

    patterns = ((r"layers\.\d+\.attn1", "self"), (r"layers\.\d+\.attn2", "cross"))
    batches_prompts = True
    text_length = 256
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "lumina-next"

    def timestep(self, call: ModelCall) -> Tensor | float | None:
        return reversed_time(super().timestep(call))

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        return (1, *(config.sample_size // config.patch_size,) * 2)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        return TokenLayout.video(*image_grid(call["hidden_states"], model.config.patch_size))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        dim = config.hidden_size // config.num_attention_heads
        longest = max(384, *latents)
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.cross_attention_dim),
            "encoder_mask": zeros(model, batch, text) + 1,
            "image_rotary_emb": zeros(model, longest, longest, dim // 2).to(model.dtype) + 0j,
            "cross_attention_kwargs": {},
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        _, height, width = axes

        def change(table: Tensor, _: dict[str, Any]) -> Tensor:
            # (rows, columns, D / 2): a frequency of rows, then the same one of columns.
            rows = rescaled_rows(table[:, 0, ::2], height)
            columns = rescaled_rows(table[0, :, 1::2], width)
            both = rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)
            return torch.stack(both, -1).flatten(2)

        return argument_changed(model, "image_rotary_emb", change)


class Lumina2Binding(LuminaNextBinding):
    """Lumina-Image 2.0: text, then the image; refiners of the image alone before.

    The image follows the last token of a text that counts: samples whose texts differ in length
    have no layout in common.
    """

    patterns = ((r"noise_refiner\.\d+\.attn", "self"), (r"layers\.\d+\.attn", "joint"))
    batches_prompts = False
    mixes_text = r"layers\..+"
    one_prompt = "its image begins where the text of a sample ends"
    text_length = 0
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "lumina2"

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        image = super().layout(model, call, layer)
        if layer.kind == "self":
            return image
        lengths = call.read(call["encoder_attention_mask"], lambda mask: mask.sum(1).tolist())
        if len(set(lengths)) > 1:
            raise LayoutUnknown("the images of the samples begin at different tokens")
        _, height, width = image.grid
        return TokenLayout.image(height, width, text_before=int(lengths[0]))

    def skip_reason(self, name: str) -> str:
        return "text token refiner" if "context_refiner" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.cap_feat_dim),
            # Never on the meta device, as the layout is read from its values.
            "encoder_attention_mask": torch.ones(batch, text, dtype=torch.long).to(
                "cpu" if model.device.type == "meta" else model.device
            ),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.rope_embedder
        return exchanged(rope, "freqs_cis", scaled_tables(rope.freqs_cis, rope.theta, axes))
