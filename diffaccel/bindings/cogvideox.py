"""Bindings of CogVideoX 1.0 and 1.5, and of ConsisID."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    UnsupportedModelError,
    patched,
    zeros,
)
from diffaccel.bindings.passed_tables import argument_changed, rescaled_grid
from diffaccel.layout import Grid, TokenLayout


class CogVideoXBinding(Binding):
    """CogVideoX 1.0 and 1.5: text first, then the video; latents are (B, F, C, H, W)."""

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    batches_prompts = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "cogvideox"

    def longest_text(self, model: Any) -> int | None:
        # A table of positions has one length; rotary ones pass the text over.
        config = model.config
        has_table = not config.use_rotary_positional_embeddings
        is_fixed = has_table or config.use_learned_positional_embeddings
        return config.max_text_seq_length if is_fixed else None

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        config = model.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        sides = (side // config.patch_size for side in (config.sample_height, config.sample_width))
        return (max(1, frames // (config.get("patch_size_t") or 1)), *sides)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = _grid(model, call["hidden_states"])
        return TokenLayout.video(*grid, text_before=call["encoder_hidden_states"].shape[1])

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        frames, height, width = latents
        tokens = prod(latents) // config.patch_size**2 // (config.get("patch_size_t") or 1)
        call: dict[str, Any] = {
            "hidden_states": zeros(model, batch, frames, config.in_channels, height, width),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "timestep": zeros(model, batch),
        }
        if config.get("ofs_embed_dim"):
            call["ofs"] = zeros(model, 1)
        if config.use_rotary_positional_embeddings:
            call["image_rotary_emb"] = (zeros(model, tokens, config.attention_head_dim),) * 2
        return call

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        if not model.config.use_rotary_positional_embeddings:
            raise UnsupportedModelError(
                "CogVideoX with rotary positions (5B, 1.5) can scale them, got one with a table "
                "of positions (2B); leave them as they are"
            )
        dim = model.config.attention_head_dim
        dims = dim // 4, dim // 8 * 3, dim // 8 * 3

        def change(tables: Any, arguments: dict[str, Any]) -> Any:
            return rescaled_grid(tables, _grid(model, arguments["hidden_states"]), dims, axes)

        return argument_changed(model, "image_rotary_emb", change)


def _grid(model: Any, latents: Tensor) -> Grid:
    """Returns the grid of tokens of latents (B, F, C, H, W)."""
    _, frames, _, height, width = latents.shape
    patch, patch_t = model.config.patch_size, model.config.get("patch_size_t") or 1
    return patched(frames, patch_t), patched(height, patch), patched(width, patch)


class ConsisIDBinding(CogVideoXBinding):
    """ConsisID: CogVideoX whose blocks are followed by cross-attention to a face."""

    is_chain = False

    def family(self, model: Any, pipe: Any) -> str:
        return "consisid"

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        call, config = super().example_call(model, latents, text, batch), model.config
        if config.is_train_face:
            seen = zeros(model, batch, 577, config.LFE_vit_dim)  # of a picture of 336 x 336
            call["id_cond"] = zeros(model, batch, config.LFE_id_dim)
            call["id_vit_hidden"] = [seen] * config.LFE_num_scale
        return call
