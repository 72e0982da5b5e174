"""Bindings of LTX-Video and LTX-2."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, zeros
from diffaccel.bindings.exchange import exchanged_forward
from diffaccel.bindings.ltx_positions import (
    Axes,
    packed_segments,
    scaled_forward,
    scaled_forward_2,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class LTXVideoBinding(Binding):
    """LTX-Video: self-attention over the video alone, which arrives packed.

    The pipelines pass the grid of tokens as numbers, or the coordinates of each token where
    frames that condition are packed with those to denoise. Coordinates are read once for each
    tensor, one wait for the device.
    """

    patterns = (
        (r"transformer_blocks\.\d+\.attn1", "self"),
        (r"transformer_blocks\.\d+\.attn2", "cross"),
    )
    text_length = 128
    batches_prompts = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "ltx"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (21, 16, 22)  # 161 frames of 512 x 704, each token 32 x 32 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        # Where coordinates are given, the numbers may be ones that stand for nothing.
        tokens, coords = call["hidden_states"].shape[1], call.arguments.get("video_coords")
        grid = tuple(call.arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
        if coords is not None and prod(grid) != tokens:
            return TokenLayout(call.read(coords, packed_segments))
        return TokenLayout.video(call["num_frames"], call["height"], call["width"])

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        frames, height, width = latents
        config = model.config
        return {
            "hidden_states": zeros(model, batch, prod(latents), config.in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.caption_channels),
            "timestep": zeros(model, batch),
            "encoder_attention_mask": zeros(model, batch, text) + 1,
            "num_frames": frames,
            "height": height,
            "width": width,
        }

    def scaled_rope(self, model: Any, axes: Axes) -> AbstractContextManager[None]:
        return exchanged_forward(model.rope, scaled_forward(axes))


class LTX2VideoBinding(LTXVideoBinding):
    """LTX-2: of its six kinds of attention, that of the video to itself.

    The video to denoise comes first in every pipeline, then keyframes and reference videos. Where
    its size is not passed, the coordinates of the tokens tell it.
    """

    block_outputs = ("hidden_states", "audio_hidden_states")
    text_length = 1024

    def family(self, model: Any, pipe: Any) -> str:
        return "ltx2"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (16, 16, 24)  # 121 frames of 512 x 768, each token 32 x 32 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = [call.arguments.get(name) or 0 for name in ("num_frames", "height", "width")]
        more = call["hidden_states"].shape[1] - prod(grid)
        if not prod(grid) or more <= 0:
            return super().layout(model, call, layer)
        video = TokenLayout.video(*grid)
        return TokenLayout((*video.segments, Segment("condition", more)))

    def skip_reason(self, name: str) -> str:
        kind = name.rpartition(".")[2]
        if kind in ("audio_to_video_attn", "video_to_audio_attn"):
            return "cross-attention between video and audio"
        if kind.startswith("audio"):
            return "attention of the audio"
        return super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = super().example_call(model, latents, text, batch)
        widths = (config.cross_attention_dim, config.audio_cross_attention_dim)
        if config.use_prompt_embeddings:
            widths = (config.caption_channels,) * 2
        audio = 8 * latents[0]  # a second has some 3 latent frames and 25 of the audio
        mask = call["encoder_attention_mask"]
        return call | {
            "audio_hidden_states": zeros(model, batch, audio, config.audio_in_channels),
            "encoder_hidden_states": zeros(model, batch, text, widths[0]),
            "audio_encoder_hidden_states": zeros(model, batch, text, widths[1]),
            "audio_encoder_attention_mask": mask,
            "sigma": zeros(model, batch),
            "audio_num_frames": audio,
        }

    def scaled_rope(self, model: Any, axes: Axes) -> AbstractContextManager[None]:
        return exchanged_forward(model.rope, scaled_forward_2(axes))
