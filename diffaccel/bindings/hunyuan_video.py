"""Bindings of HunyuanVideo, HunyuanVideo 1.5, Framepack and Motif-Video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
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
from diffaccel.bindings.tables import grid_places, output_changed, rescaled_waves
from diffaccel.layout import Grid, Segment, TokenLayout


class HunyuanVideoBinding(Binding):
    """HunyuanVideo: the video first, then text, whose padding the attention mask excludes."""

    patterns: tuple[tuple[str, str], ...] = (
        (r"(single_)?transformer_blocks\.\d+\.attn", "joint"),
    )
    block_outputs = ("hidden_states", "encoder_hidden_states")
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "hunyuan"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (33, 45, 80)  # 129 frames of 720 x 1280

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((_video(model, call), text))

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

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges columns of what the module returns: cosines and sines (tokens, D).
        rope = model.rope

        def change(args: tuple, kwargs: dict[str, Any], tables: Any) -> tuple[Tensor, Tensor]:
            places = self.places(rope, *args, **kwargs)
            return rescaled_waves(tables, places, rope.rope_dim, rope.theta, axes)

        with output_changed(rope, change):
            yield

    def places(self, rope: Any, hidden_states: Tensor) -> list[Tensor]:
        """Returns frame, row and column of each token; gets what the rotary module gets."""
        patches = rope.patch_size_t, rope.patch_size, rope.patch_size
        sizes = map(patched, hidden_states.shape[-3:], patches)
        return grid_places([*sizes], hidden_states.device)


class HunyuanVideo15Binding(HunyuanVideoBinding):
    """HunyuanVideo 1.5: the video first, then picture, glyphs and text, valid tokens in front."""

    writes_masks_out = True
    one_prompt = "its text comes from two encoders"

    def family(self, model: Any, pipe: Any) -> str:
        return "hunyuan-1.5"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        is_large = model.config.target_size > 640  # 121 frames, 720 or 480 rows
        return told_native(model) or ((31, 45, 80) if is_large else (31, 30, 53))

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        streams = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        text = sum(call[name].shape[1] for name in streams)
        return TokenLayout((_video(model, call), Segment("text", text)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        glyphs, picture = 256, 729
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "encoder_attention_mask": zeros(model, batch, text).long() + 1,
            "encoder_hidden_states_2": zeros(model, batch, glyphs, config.text_embed_2_dim),
            "encoder_attention_mask_2": zeros(model, batch, glyphs).long(),
            "image_embeds": zeros(model, batch, picture, config.image_embed_dim),
        }
        return call | ({"timestep_r": zeros(model, batch)} if config.use_meanflow else {})


HISTORY = (
    ("latents_history_4x", "indices_latents_history_4x", (4, 8, 8)),
    ("latents_history_2x", "indices_latents_history_2x", (2, 4, 4)),
    ("latents_clean", "indices_latents_clean", (1, 2, 2)),
)
"""Framepack's history in the order of its tokens: latents, their frames, their patch."""


class FramepackBinding(HunyuanVideoBinding):
    """Framepack: frames so far, the farther the coarser, the next frames, a picture, text."""

    def family(self, model: Any, pipe: Any) -> str:
        return "framepack"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (9, 45, 80)  # a window of 33 frames of 720 x 1280

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        history = []
        for latents, indices, patch in HISTORY:
            given = call.arguments.get(latents)
            if given is not None and call.arguments.get(indices) is not None:
                # What does not fill a patch is padded.
                grid = [
                    -(-size // side) for size, side in zip(given.shape[-3:], patch, strict=True)
                ]
                history.append(Segment("condition", prod(grid), tuple(grid)))
        text = call["encoder_hidden_states"].shape[1]
        if len(call["hidden_states"]) == 1:  # padding is cut off
            text = call.read(call["encoder_attention_mask"], lambda mask: int(mask.sum()))
        picture = Segment("condition", call["image_embeds"].shape[1])
        return TokenLayout((*history, _video(model, call), picture, Segment("text", text)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        frames, height, width = latents
        call = super().example_call(model, latents, text, batch) | {
            "image_embeds": zeros(model, batch, 729, config.image_proj_dim),
            # Never on the meta device, as the layout is read from its values.
            "encoder_attention_mask": torch.ones(batch, text, dtype=torch.long).to(
                "cpu" if model.device.type == "meta" else model.device
            ),
            "indices_latents": torch.arange(19, 19 + frames),
        }
        first = 0
        for (name, indices, _), count in zip(HISTORY, (16, 2, 2), strict=True):
            call[name] = zeros(model, batch, config.in_channels, count, height, width)
            call[indices] = torch.arange(first, first + count)
            first += count
        return call

    def places(  # type: ignore[override]
        self, rope: Any, frame_indices: Tensor, height: int, width: int, device: torch.device
    ) -> list[Tensor]:
        """Returns frame, row and column of each token; gets what the rotary module gets."""
        rows, columns = height // rope.patch_size, width // rope.patch_size
        frame, row, column = grid_places([len(frame_indices), rows, columns], device)
        return [frame_indices.to(frame)[frame.long()], row, column]


class MotifVideoBinding(HunyuanVideoBinding):
    """Motif-Video: the video first, then a picture and text.

    The last single blocks decode: their sequence is the video twice, as it entered the model and
    as it left the blocks before.
    """

    patterns = (
        (r"(single_)?transformer_blocks\.\d+\.attn", "joint"),
        (r"(single_)?transformer_blocks\.\d+\.cross_attn", "cross"),
    )
    is_chain = False

    def family(self, model: Any, pipe: Any) -> str:
        return "motif-video"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (31, 46, 80)  # 121 frames of 736 x 1280

    def layers(self, model: Any) -> tuple[AttentionLayer, ...]:
        found = super().layers(model)
        first = len(found) - model.config.num_decoder_layers
        return (*found[:first], *(replace(layer, kind="self") for layer in found[first:]))

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        video = _video(model, call)
        if layer.kind == "self":
            return TokenLayout((video, replace(video, kind="condition")))
        picture = call.arguments.get("image_embeds")
        return TokenLayout(
            (
                video,
                Segment("condition", 0 if picture is None else picture.shape[1]),
                Segment("text", call["encoder_hidden_states"].shape[1]),
            )
        )

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "encoder_attention_mask": zeros(model, batch, text).long() + 1,
        }
        if config.image_embed_dim:
            call["image_embeds"] = zeros(model, batch, 256, config.image_embed_dim)
        return call


def _video(model: Any, call: ModelCall) -> Segment:
    config = model.config
    patches = config.patch_size_t, config.patch_size, config.patch_size
    frames, rows, columns = map(patched, call["hidden_states"].shape[-3:], patches)
    return Segment("visual", frames * rows * columns, (frames, rows, columns))
