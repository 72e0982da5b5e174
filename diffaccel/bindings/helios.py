"""Binding of Helios."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, ModelCall, patched, told_native, zeros
from diffaccel.bindings.tables import rescaled_frequencies
from diffaccel.bindings.wan import WanBinding
from diffaccel.layout import Grid, Segment, TokenLayout

HISTORY = (("long", 4), ("mid", 2), ("short", 1))
"""Helios' history in the order of its tokens: name, its patch in those of the video."""


class HeliosBinding(WanBinding):
    """Helios: frames so far, the farther the coarser, then the next frames; else like Wan."""

    def family(self, model: Any, pipe: Any) -> str:
        return "helios"

    def longest_text(self, model: Any) -> int | None:
        return None

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (9, 24, 40)  # a chunk of 33 frames of 384 x 640

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        patch = model.config.patch_size
        segments = []
        for name, scale in HISTORY:
            latents = call.arguments.get(f"latents_history_{name}")
            indices = call.arguments.get(f"indices_latents_history_{name}")
            if latents is not None and indices is not None:
                sizes = zip(latents.shape[-3:], patch, strict=True)
                # What does not fill a patch is padded.
                grid = tuple(-(-size // (scale * side)) for size, side in sizes)
                segments.append(Segment("condition", prod(grid), grid))
        frames, height, width = map(patched, call["hidden_states"].shape[-3:], patch)
        video = Segment("visual", frames * height * width, (frames, height, width))
        return TokenLayout((*segments, video))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        channels, first = model.config.in_channels, 0
        call = super().example_call(model, latents, text, batch)
        for (name, _), count in zip(HISTORY, (16, 2, 2), strict=True):
            history = zeros(model, batch, channels, count, *latents[1:])
            call[f"latents_history_{name}"] = history
            call[f"indices_latents_history_{name}"] = torch.arange(first, first + count)[None]
            first += count
        return call | {"indices_hidden_states": torch.arange(first, first + latents[0])[None]}

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # The module returns (B, 2 D, frames, height, width): cosines, then sines.
        def amplified(factor: Tensor, rows: Tensor) -> Tensor:
            return rows * factor.repeat_interleave(2).repeat(2)[:, None, None, None].to(rows)

        names = "freqs_base_t", "freqs_base_y", "freqs_base_x"
        with rescaled_frequencies(model.rope, names, axes, amplified):
            yield
