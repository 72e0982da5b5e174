"""Binding of OmniGen."""

from __future__ import annotations

from typing import Any

import torch

from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    image_grid,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.layout import Grid, Segment, TokenLayout


class OmniGenBinding(Binding):
    """OmniGen: text with the images that it speaks of, a time token, then the image.

    Text sees what stands before it; the image sees all but padding. Rotary positions count tokens
    of the whole sequence, not rows and columns.
    """

    patterns = ((r"layers\.\d+\.self_attn", "joint"),)
    batches_prompts = True
    mixes_text = r"layers\..+"
    unguided = "its pipeline does not tell which rows of a batch hold the prompt"

    def family(self, model: Any, pipe: Any) -> str:
        return "omnigen"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        grid = image_grid(call["hidden_states"], model.config.patch_size)
        ids = call.arguments.get("input_ids")
        text = Segment("text", 0 if ids is None else ids.shape[1])
        return TokenLayout((text, Segment("condition", 1), *target_and_references([grid])))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        rows, columns = (side // model.config.patch_size for side in latents)
        count = text + 1 + rows * columns
        mask = zeros(model, batch, count, count) + 1
        mask[:, : text + 1] = mask[:, : text + 1].tril()
        return {
            "hidden_states": zeros(model, batch, model.config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "input_ids": zeros(model, batch, text).long(),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": mask,
            "position_ids": torch.arange(count, device=model.device).expand(batch, count),
        }
