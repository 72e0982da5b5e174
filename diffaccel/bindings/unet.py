"""Bindings of the U-Nets of Stable Diffusion 1.x, 2.x and XL, and of ControlNet-XS."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, zeros
from diffaccel.layout import Grid, TokenLayout


class UNetBinding(Binding):
    """U-Nets: `attn1` is self-attention over the image at the resolution of its level."""

    patterns: tuple[tuple[str, str], ...] = (
        (r".+\.attentions\.\d+\.transformer_blocks\.\d+\.attn1", "self"),
        (r".+\.attentions\.\d+\.transformer_blocks\.\d+\.attn2", "cross"),
    )
    stacks = ("down_blocks", "mid_block", "up_blocks")
    is_chain = False
    batches_prompts = True
    latents = "sample"
    text_length = 77

    family_choices = ("sd15", "sdxl")

    def family(self, model: Any, pipe: Any) -> str:
        return "sdxl" if model.config.addition_embed_type == "text_time" else "sd15"

    def stages(self, model: Any) -> tuple[str, ...]:
        down = [f"down_blocks.{index}" for index in range(len(model.down_blocks))]
        up = [f"up_blocks.{index}" for index in range(len(model.up_blocks))]
        return (*down, *(["mid_block"] if model.mid_block is not None else []), *up)

    def level(self, model: Any, name: str) -> int:
        place, number = name.split(".")[:2]
        deepest = len(model.config.down_block_types) - 1
        if place == "mid_block":
            return deepest
        return int(number) if place == "down_blocks" else deepest - int(number)

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        size = model.config.sample_size
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return 1, max(1, height >> layer.level), max(1, width >> layer.level)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        height, width = call["sample"].shape[-2:]
        for _ in range(layer.level):
            # Downsampling with padding 1 keeps the last row and column of odd sizes.
            height, width = (height + 1) // 2, (width + 1) // 2
        return TokenLayout.image(height, width)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call: dict[str, Any] = {
            "sample": zeros(model, batch, config.get("in_channels", 4), *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, text_width(model)),
        }
        if config.addition_embed_type == "text_time":
            sizes = 6  # original size, corner of the crop, target size
            width = config.projection_class_embeddings_input_dim
            call["added_cond_kwargs"] = {
                "text_embeds": zeros(model, batch, width - sizes * config.addition_time_embed_dim),
                "time_ids": zeros(model, batch, sizes),
            }
        return call


class DreamLiteBinding(UNetBinding):
    """DreamLite: a canvas of the image to denoise, and the image to edit at its right.

    Only the deep levels have self-attention.
    """

    text_length = 200

    def family(self, model: Any, pipe: Any) -> str:
        return "dreamlite"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        side = (model.config.sample_size or 128) >> layer.level  # 1024 pixels
        return 1, max(1, side), max(1, 2 * side)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        height, width = latents
        config = model.config
        features = config.encoder_hid_dim or config.cross_attention_dim
        call: dict[str, Any] = {
            "sample": zeros(model, batch, config.in_channels, height, 2 * width),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, features),
            "encoder_attention_mask": zeros(model, batch, text) == 0,
        }
        if config.addition_embed_type == "time":
            numbers = config.projection_class_embeddings_input_dim
            sizes = zeros(model, batch, numbers // config.addition_time_embed_dim)
            call["added_cond_kwargs"] = {"time_ids": sizes}
        return call


def text_width(model: Any) -> int:
    """Returns the channels of the text, which some configurations write out for each level."""
    width = model.config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


class ControlNetXSBinding(UNetBinding):
    """A U-Net joined with a ControlNet-XS, whose own layers stay as they are."""

    patterns = tuple(
        (
            rf"(down_blocks\.\d+\.base_attentions|mid_block\.base_midblock\.attentions|"
            rf"up_blocks\.\d+\.attentions)\.\d+\.transformer_blocks\.\d+\.{name}",
            kind,
        )
        for name, kind in (("attn1", "self"), ("attn2", "cross"))
    )

    def skip_reason(self, name: str) -> str:
        return "control branch" if ".ctrl_" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        pixels = 2 ** (len(config.ctrl_conditioning_embedding_out_channels) - 1)
        sides = (pixels * side for side in latents)
        channels = config.ctrl_conditioning_channels
        condition = zeros(model, batch, channels, *sides)
        call = super().example_call(model, latents, text, batch)
        return call | {"controlnet_cond": condition}
