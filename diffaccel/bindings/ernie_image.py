"""Binding of Ernie-Image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, angles
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    UnsupportedModelError,
    image_grid,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class ErnieImageBinding(Binding):
    """Ernie-Image: the image first, then text, whose padding the attention mask excludes."""

    patterns = ((r"layers\.\d+\.self_attention", "joint"),)
    block_outputs = ("x",)
    batches_prompts = True
    mixes_text = r"layers\..+"
    one_prompt = "its prompt is more than one argument of a call"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "ernie-image"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def stages(self, model: Any) -> tuple[str, ...]:
        # Blocks hand on (tokens, B, C): what they return cannot be split by samples.
        return ()

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = image_grid(call["hidden_states"], model.config.patch_size)
        text = Segment("text", call["text_bth"].shape[1])
        return TokenLayout((*target_and_references([grid]), text))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        # The pipeline packs 2 x 2 latent elements into channels.
        sides = (side // 2 for side in latents)
        config = model.config
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *sides),
            "timestep": zeros(model, batch),
            "text_bth": zeros(model, batch, text, config.text_in_dim),
            "text_lens": torch.full((batch,), text, device=model.device),
        }

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the function from places (B, N, 3) to angles (B, N, 1, D).
        if any(axis is not None and axis.amplitude != 1.0 for axis in axes):
            raise UnsupportedModelError(
                "positions of ErnieImageTransformer2DModel are angles, which cannot sharpen the "
                "softmax, got Yarn; pass Linear or Ntk"
            )
        embedding = model.pos_embed

        def forward(self: Any, ids: Tensor) -> Tensor:
            parts = [
                angles(ids[..., number].double(), _frequencies(ids, dim, self.theta), axis)
                for number, (dim, axis) in enumerate(zip(self.axes_dim, axes, strict=True))
            ]
            return torch.cat(parts, -1).float().repeat_interleave(2, -1).unsqueeze(2)

        embedding.forward = MethodType(forward, embedding)
        try:
            yield
        finally:
            del embedding.forward


def _frequencies(ids: Tensor, dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
