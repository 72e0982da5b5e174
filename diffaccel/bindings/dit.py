"""Bindings of DiT, PixArt and HunyuanDiT: an image alone, in patches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, image_grid, zeros
from diffaccel.bindings.passed_tables import argument_changed, rescaled_grid
from diffaccel.layout import Grid, TokenLayout


class DiTBinding(Binding):
    """DiT: self-attention over the image alone; its condition is a class."""

    patterns = (
        (r"(transformer_)?blocks\.\d+\.attn1", "self"),
        (r"(transformer_)?blocks\.\d+\.attn2", "cross"),
    )
    batches_prompts = True
    one_prompt = "it has no text"

    def family(self, model: Any, pipe: Any) -> str:
        return "dit"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        return (1, *(config.sample_size // config.patch_size,) * 2)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        return TokenLayout.video(*image_grid(call["hidden_states"], model.config.patch_size))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        return {
            "hidden_states": zeros(model, batch, model.config.in_channels, *latents),
            "timestep": zeros(model, batch).long(),
            "class_labels": zeros(model, batch).long(),
        }


class PixArtBinding(DiTBinding):
    """PixArt-Alpha and Sigma: the same with text, which is cross-attended."""

    one_prompt = ""
    text_length = 300  # Sigma; Alpha has 120

    def family(self, model: Any, pipe: Any) -> str:
        return "pixart"

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        width = config.caption_channels or config.cross_attention_dim
        has_sizes = model.use_additional_conditions
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, width),
            "timestep": zeros(model, batch),
            "added_cond_kwargs": {
                "resolution": zeros(model, batch, 2) if has_sizes else None,
                "aspect_ratio": zeros(model, batch, 1) if has_sizes else None,
            },
            "encoder_attention_mask": zeros(model, batch, text) + 1,
        }


class HunyuanDiTBinding(DiTBinding):
    """HunyuanDiT: text of two encoders is cross-attended; later blocks get early outputs too."""

    is_chain = False
    one_prompt = "its text comes from two encoders"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "hunyuan-dit"

    def longest_text(self, model: Any) -> int | None:
        return model.config.text_len

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        sides = [side // config.patch_size for side in latents]
        dim = config.hidden_size // config.num_attention_heads
        t5 = config.text_len_t5
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(
                model, batch, config.text_len, config.cross_attention_dim
            ),
            "text_embedding_mask": zeros(model, batch, config.text_len) + 1,
            "encoder_hidden_states_t5": zeros(model, batch, t5, config.cross_attention_dim_t5),
            "text_embedding_mask_t5": zeros(model, batch, t5) + 1,
            "image_rotary_emb": (zeros(model, sides[0] * sides[1], dim),) * 2,
        }
        if config.use_style_cond_and_image_meta_size:
            call["image_meta_size"] = zeros(model, batch, 6)
            call["style"] = zeros(model, batch).long()
        return call

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        _, height, width = axes
        dims = (model.config.hidden_size // model.config.num_attention_heads // 2,) * 2

        def change(tables: Any, arguments: dict[str, Any]) -> Any:
            _, *sides = image_grid(arguments["hidden_states"], model.config.patch_size)
            # Columns come first in the tables of diffusers' pipeline, and rows second.
            by_axis = [torch.cat(wave.chunk(2, 1)[::-1], 1) for wave in tables]
            found = rescaled_grid((by_axis[0], by_axis[1]), sides, dims, (height, width))
            return tuple(torch.cat(wave.chunk(2, 1)[::-1], 1) for wave in found)

        return argument_changed(model, "image_rotary_emb", change)
