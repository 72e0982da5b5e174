"""Binding of Kandinsky 3."""

from __future__ import annotations

from typing import Any

from diffaccel.bindings.base import AttentionLayer, ModelCall, told_native, zeros
from diffaccel.bindings.unet import UNetBinding
from diffaccel.layout import Grid, TokenLayout


class Kandinsky3Binding(UNetBinding):
    """Kandinsky 3: the first attention of a level is self-attention, the others see the text."""

    patterns = (
        (r"(down|up)_blocks\.\d+\.attentions\.0\.attention", "self"),
        (r"(down|up)_blocks\.\d+\.attentions\.\d+\.attention", "cross"),
    )
    block_outputs = ("x",)
    blocks_of_images = True
    text_length = 128

    def family(self, model: Any, pipe: Any) -> str:
        return "kandinsky3"

    def stages(self, model: Any) -> tuple[str, ...]:
        parts = {"down_blocks": model.down_blocks, "up_blocks": model.up_blocks}
        return tuple(f"{name}.{i}" for name, blocks in parts.items() for i in range(len(blocks)))

    def level(self, model: Any, name: str) -> int:
        place, number = name.split(".")[:2]
        if place not in ("down_blocks", "up_blocks"):
            return 0
        return int(number) if place == "down_blocks" else len(model.up_blocks) - 1 - int(number)

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        _, height, width = told_native(model) or (1, 128, 128)  # 1024 pixels, at the top
        return 1, max(1, height >> layer.level), max(1, width >> layer.level)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        return TokenLayout.image(*(side >> layer.level for side in call["sample"].shape[-2:]))

    def skip_reason(self, name: str) -> str:
        return "pooling of the text" if "add_time" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "sample": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.encoder_hid_dim),
            "encoder_attention_mask": zeros(model, batch, text) + 1,
        }
