"""Bindings of U-Nets for video: AnimateDiff, Stable Video Diffusion, ModelScope, I2VGen-XL."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import TEMPORAL, AttentionLayer, zeros
from diffaccel.bindings.unet import UNetBinding, text_width
from diffaccel.layout import Grid


class VideoUNetBinding(UNetBinding):
    """U-Nets whose frames are further rows of the batch; latents are (B, C, F, H, W).

    Attention along time stays as it is.
    """

    published_family = ""

    def family(self, model: Any, pipe: Any) -> str:
        return self.published_family

    def skip_reason(self, name: str) -> str:
        return super().skip_reason(name) if self._kind(name) == "cross" else TEMPORAL

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return super().native(model, layer) or (1, *(max(1, 64 >> layer.level),) * 2)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "sample": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, text_width(model)),
        }


class ModelScopeBinding(VideoUNetBinding):
    """ModelScope and Zeroscope."""

    published_family = "modelscope"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (1, *(max(1, 32 >> layer.level),) * 2)  # 256 x 256


class AnimateDiffBinding(VideoUNetBinding):
    """AnimateDiff: a U-Net of Stable Diffusion with motion modules; text comes for each frame."""

    patterns = tuple(
        (rf".+\.attentions\.\d+(\.module)?\.transformer_blocks\.\d+\.{name}", kind)
        for name, kind in (("attn1", "self"), ("attn2", "cross"))
    )
    """Split inference, for long videos, puts a `module` between."""
    unguided = "the rows of a prompt cannot be told from those of its frames"
    published_family = "animatediff"

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        call = UNetBinding.example_call(self, model, latents, text, batch)
        states = zeros(model, batch * latents[0], text, text_width(model))
        return call | {"encoder_hidden_states": states}


class StableVideoBinding(VideoUNetBinding):
    """Stable Video Diffusion: latents are (B, F, C, H, W); a picture is cross-attended."""

    text_length = 1
    published_family = "svd"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (1, max(1, 72 >> layer.level), max(1, 128 >> layer.level))  # 576 x 1024

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = super().example_call(model, latents, text, batch)
        frames, height, width = latents
        ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
        call["sample"] = zeros(model, batch, frames, config.in_channels, height, width)
        return call | {"added_time_ids": zeros(model, batch, ids)}


class I2VGenXLBinding(VideoUNetBinding):
    """I2VGen-XL: tokens of the first frame are cross-attended beside the text."""

    published_family = "i2vgen-xl"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (1, max(1, 88 >> layer.level), max(1, 160 >> layer.level))  # 704 x 1280

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return super().example_call(model, latents, text, batch) | {
            "fps": zeros(model, batch) + 16,
            "image_latents": zeros(model, batch, config.in_channels, *latents),
            "image_embeddings": zeros(model, batch, config.cross_attention_dim),
        }
