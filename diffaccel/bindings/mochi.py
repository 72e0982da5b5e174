"""Binding of Mochi 1."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, Binding, ModelCall, patched, zeros
from diffaccel.bindings.exchange import exchanged
from diffaccel.layout import Grid, TokenLayout


class MochiBinding(Binding):
    """Mochi 1: the video first, then its text; each sample in a call of its own.

    Its rotary frequencies are learned, one set for each head and axis, and each wave turns with
    the sum over the axes. Rows and columns count from the middle, and keep the area of a picture.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    batches_prompts = True
    cuts_text = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "mochi"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (28, 30, 53)  # 163 frames of 480 x 848

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        frames, height, width = call["hidden_states"].shape[-3:]
        patch = model.config.patch_size
        return TokenLayout.video(
            frames,
            patched(height, patch),
            patched(width, patch),
            text_after=call["encoder_hidden_states"].shape[1],
        )

    def skip_reason(self, name: str) -> str:
        return "text pooling" if "time_embed" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "timestep": zeros(model, batch),
            "encoder_attention_mask": zeros(model, batch, text).bool().logical_not(),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.rope
        # A wave belongs to all axes, so it gets the mean of their factors.
        factor = sum(1.0 if axis is None else axis.amplitude for axis in axes) / 3

        def forward(
            frequencies: Tensor, frames: int, height: int, width: int, **options: Any
        ) -> tuple[Tensor, Tensor]:
            spacing = (rope.target_area / (height * width)) ** 0.5
            scaled = torch.stack(
                [
                    own if axis is None else _rescaled(own, axis, step)
                    for own, axis, step in zip(
                        frequencies, axes, (1.0, spacing, spacing), strict=True
                    )
                ]
            )
            waves = type(rope).forward(rope, scaled, frames, height, width, **options)
            return factor * waves[0], factor * waves[1]

        return exchanged(rope, "forward", forward)


def _rescaled(learned: Tensor, axis: Axis, step: float) -> Tensor:
    """Returns learned frequencies (H, D / 2) of one axis, scaled from the fastest to the slowest.

    Args:
        learned: In radians per unit, of either sign and in any order.
        axis: What happens to them.
        step: Units from one token to the next.
    """
    found = []
    for own in (step * learned.double()).unbind():
        speeds, order = own.abs().sort(descending=True)
        scaled = torch.zeros_like(own).index_copy(0, order, axis.rescaled(speeds))
        found.append(scaled * own.sign())
    return (torch.stack(found) / step).to(learned)
