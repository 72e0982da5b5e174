"""Binding of Allegro."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.bindings.passed_tables import argument_changed, rescaled_rows
from diffaccel.layout import Grid, TokenLayout


class AllegroBinding(Binding):
    """Allegro: self-attention over the video alone; text is cross-attended."""

    patterns = (
        (r"transformer_blocks\.\d+\.attn1", "self"),
        (r"transformer_blocks\.\d+\.attn2", "cross"),
    )
    text_length = 512
    batches_prompts = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "allegro"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        sides = (side // config.patch_size for side in (config.sample_height, config.sample_width))
        return (config.sample_frames // config.patch_size_t, *sides)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        config = model.config
        patches = (config.patch_size_t, config.patch_size, config.patch_size)
        return TokenLayout.video(*map(patched, call["hidden_states"].shape[-3:], patches))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        sides = (latents[0], *(side // config.patch_size for side in latents[1:]))
        places = torch.cartesian_prod(*(torch.arange(side) for side in sides)).to(model.device)
        half = config.attention_head_dim // 3
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.caption_channels),
            "timestep": zeros(model, batch),
            "encoder_attention_mask": zeros(model, batch, text) + 1,
            "image_rotary_emb": (
                tuple((zeros(model, side, half),) * 2 for side in sides),
                tuple(places.T.unsqueeze(1)),
            ),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        def change(given: Any, _: dict[str, Any]) -> Any:
            tables, places = given
            return tuple(map(_rescaled, tables, axes)), places

        return argument_changed(model, "image_rotary_emb", change)


def _rescaled(table: tuple[Tensor, Tensor], axis: Axis | None) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (n, D) of one axis, all frequencies once, then again."""
    cosine, sine = (wave.double().chunk(2, 1)[0] for wave in table)
    rows = rescaled_rows(torch.complex(cosine, sine), axis)
    return torch.cat([rows.real] * 2, 1).to(table[0]), torch.cat([rows.imag] * 2, 1).to(table[1])
