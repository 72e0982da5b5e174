"""Binding of GLM-Image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, waves
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    image_grid,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class GlmImageBinding(Binding):
    """GLM-Image: text first, then the image.

    Images to edit run through the model before the first step, densely; with the prompt, their
    keys then stand before the text.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "glm-image"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = image_grid(call["hidden_states"], model.config.patch_size)
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        caches = call.arguments.get("kv_caches")
        cache: Any = None if caches is None else caches[0]
        edited = 0
        if not self.predicts(call):
            raise LayoutUnknown("the call reads an image to edit, and denoises none")
        if cache is not None and cache.mode == "read" and cache.k_caches:
            edited = cache.k_caches[0].shape[1]
        return TokenLayout((Segment("condition", edited), text, *target_and_references([grid])))

    def predicts(self, call: ModelCall) -> bool:
        caches = call.arguments.get("kv_caches")
        return caches is None or caches[0].mode != "write"

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        rows, columns = (side // config.patch_size for side in latents)
        prior = zeros(model, batch, rows * columns).long()
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "encoder_hidden_states": zeros(model, batch, text, config.text_embed_dim),
            "prior_token_id": prior,
            "prior_token_drop": prior.bool(),
            "timestep": zeros(model, batch),
            "target_size": zeros(model, batch, 2),
            "crop_coords": zeros(model, batch, 2),
        }

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the function from latents to cosines and sines (N, D).
        embedding = model.rope

        def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
            sides = [side // self.patch_size for side in hidden_states.shape[-2:]]
            places = torch.cartesian_prod(*(torch.arange(side).double() for side in sides))
            tables = [
                waves(places[:, number], self.dim // 2, self.theta, axis)
                for number, axis in enumerate(axes[1:])
            ]
            # Each frequency once, and all of them again.
            return tuple(
                torch.cat([part[:, ::2] for part in parts] * 2, 1)
                for parts in zip(*tables, strict=True)
            )

        embedding.forward = MethodType(forward, embedding)
        try:
            yield
        finally:
            del embedding.forward
