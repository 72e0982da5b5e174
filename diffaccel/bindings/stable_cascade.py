"""Binding of Stable Cascade."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, zeros
from diffaccel.layout import Grid, TokenLayout


class StableCascadeBinding(Binding):
    """Both stages: the tokens of the image attend to themselves, then to those of CLIP.

    CLIP's are text, its pooled summary, and a picture; they attend to nothing.
    """

    patterns = ((r"(down|up)_blocks\.\d+\.\d+\.attention", "joint"),)
    block_outputs = ("x",)
    blocks_of_images = True
    is_chain = False
    batches_prompts = True
    latents = "sample"

    def family(self, model: Any, pipe: Any) -> str:
        return "stable-cascade"

    def level(self, model: Any, name: str) -> int:
        place, number = name.split(".")[:2]
        deepest = len(model.config.block_out_channels) - 1
        return int(number) if place == "down_blocks" else deepest - int(number)

    def timestep(self, call: ModelCall) -> Any:
        return call.arguments.get("timestep_ratio")

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        is_second = model.config.effnet_in_channels is not None
        side = _side(model, layer.level, 256 if is_second else 24)  # 1024 pixels
        return (1, side, side)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        height, width = (_side(model, layer.level, side) for side in call["sample"].shape[-2:])
        repeats = model.config.clip_seq
        text = call["clip_text_pooled"].shape[1] * repeats
        words, picture = (call.arguments.get(name) for name in ("clip_text", "clip_img"))
        if words is not None and picture is not None:  # the model takes both or none
            text += words.shape[1] + repeats * (picture.shape[1] if picture.ndim > 2 else 1)
        return TokenLayout.image(height, width, text_after=text)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = {
            "sample": zeros(model, batch, config.in_channels, *latents),
            "timestep_ratio": zeros(model, batch),
            "clip_text_pooled": zeros(model, batch, 1, config.clip_text_pooled_in_channels),
        }
        if config.clip_text_in_channels is not None:
            call["clip_text"] = zeros(model, batch, text, config.clip_text_in_channels)
            call["clip_img"] = zeros(model, batch, 1, config.clip_image_in_channels)
        if config.effnet_in_channels is not None:
            call["effnet"] = zeros(model, batch, config.effnet_in_channels, 24, 24)
        return call


def _side(model: Any, level: int, side: int) -> int:
    """Returns how many tokens lie along a side of the latents at a level."""
    switches = model.config.switch_level or [True] * level
    return side // model.config.patch_size >> sum(switches[:level])
