"""Bindings of Kandinsky 5 and 6."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    patched,
    told_native,
    zeros,
)
from diffaccel.bindings.tables import rescaled_frequencies
from diffaccel.layout import Grid, Segment, TokenLayout


class Kandinsky5Binding(Binding):
    """Kandinsky 5: the image or video alone; latents are (B, F, H, W, C), text cross-attended."""

    patterns = (
        (r"visual_transformer_blocks\.\d+\.self_attention", "self"),
        (r"visual_transformer_blocks\.\d+\.cross_attention", "cross"),
    )
    block_outputs: tuple[str, ...] = ("visual_embed",)
    text_length = 512
    scales_rope = True
    angles = "args"
    """Name of the tables of angles, before the number of the axis."""

    def family(self, model: Any, pipe: Any) -> str:
        return "kandinsky-5"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        # 121 frames of 512 x 768; the configurations of image models tell no size.
        return told_native(model) or (31, 32, 48)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        if call.arguments.get("sparse_params") is not None:
            raise LayoutUnknown("the model leaves out blocks of its own choice (NABLA)")
        return TokenLayout.video(*self.grid(model, call))

    def grid(self, model: Any, call: ModelCall) -> Grid:
        """Returns (frames, height, width) in tokens of the latents."""
        sizes = call["hidden_states"].shape[1:4]
        frames, height, width = map(patched, sizes, model.config.patch_size)
        return frames, height, width

    def skip_reason(self, name: str) -> str:
        is_text = "text_transformer_blocks" in name
        return "attention within the text" if is_text else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        frames, height, width = (1, *latents)[-3:]
        config = model.config
        channels = (2 * config.in_visual_dim + 1) if config.visual_cond else config.in_visual_dim
        sizes = map(patched, (frames, height, width), config.patch_size)
        return {
            "hidden_states": zeros(model, batch, frames, height, width, channels),
            "encoder_hidden_states": zeros(model, batch, text, config.in_text_dim),
            "timestep": zeros(model, batch),
            "pooled_projections": zeros(model, batch, config.in_text_dim2),
            "visual_rope_pos": [torch.arange(size, device=model.device) for size in sizes],
            "text_rope_pos": torch.arange(text, device=model.device),
        }

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # The module returns rotations (..., D / 2, 2, 2).
        names = [f"{self.angles}_{number}" for number in range(3)]
        with rescaled_frequencies(
            model.visual_rope_embeddings,
            names,
            axes,
            lambda factor, rotations: rotations * factor[:, None, None].to(rotations),
        ):
            yield


class Kandinsky6Binding(Kandinsky5Binding):
    """Kandinsky 6: the video alone, a reference picture behind it; its sound is left alone."""

    patterns = (
        (r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", "self"),
        (r"visual_transformer_blocks\.\d+\.video_dec_block\.cross_attention", "cross"),
    )
    block_outputs = ("vis", "aud")
    returns_none = True
    text_length = 1024
    angles = "angles"

    def family(self, model: Any, pipe: Any) -> str:
        return "kandinsky-6"

    def layers(self, model: Any) -> tuple[AttentionLayer, ...]:
        # `video_dec_block` is no module that is called.
        return tuple(replace(layer, nesting=2) for layer in super().layers(model))

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        frames, height, width = self.grid(model, call)
        count, positions = frames, call.arguments.get("visual_rope_pos")
        if positions is not None:
            # A reference picture has the position of the first frame.
            times = call.read(positions[0], lambda place: place.tolist())
            rises = [later > time for time, later in zip(times, times[1:], strict=False)]
            count = (*rises, False).index(False) + 1
        rest = frames - count, height, width
        video = Segment("visual", count * height * width, (count, height, width))
        reference = (Segment("condition", prod(rest), rest),) if rest[0] else ()
        return TokenLayout((video, *reference))

    def skip_reason(self, name: str) -> str:
        if "v_cross_attention" in name or "a_cross_attention" in name:
            return "attention between video and sound"
        return "sound" if "audio_dec_block" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        call = super().example_call(model, latents, text, batch)
        del call["visual_rope_pos"], call["text_rope_pos"]
        sound = zeros(model, batch, 2 * latents[0], model.config.in_audio_dim)
        return call | {"audio_hidden_states": sound}
