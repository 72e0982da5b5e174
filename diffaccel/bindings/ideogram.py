"""Binding of Ideogram 4."""

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
    LayoutUnknown,
    ModelCall,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.bindings.position_ids import image_grids
from diffaccel.layout import Grid, Segment, TokenLayout

TEXT, IMAGE = 3, 2
"""Marks of tokens in the argument `indicator`; padding has 0."""

IMAGE_START = 65_536
"""Place of the first token of an image along each axis; text begins at 0."""


class IdeogramBinding(Binding):
    """Ideogram 4: padding and text, then the image; the unconditional model gets the image alone.

    Roles, places and the attention mask come token by token. They are read once for each tensor.
    """

    patterns = ((r"layers\.\d+\.attention", "joint"),)
    scales_rope = True
    mixes_text = r"layers\..+"
    one_prompt = "its prompt is more than one argument of a call"

    def family(self, model: Any, pipe: Any) -> str:
        return "ideogram4"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 128, 128)  # 2048 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        text = call.read(call["indicator"], _text_before)

        def grids(ids: Tensor) -> list[tuple[int, int, int]]:
            return image_grids(ids[:1, text:])

        images = call.read(call["position_ids"], grids)
        if len(images) != 1:
            raise LayoutUnknown("position_ids do not describe one image")
        return TokenLayout((Segment("text", text), *target_and_references(images)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        # The pipeline packs 2 x 2 latent elements into a token.
        rows, columns = (side // 2 for side in latents)
        config, count = model.config, text + rows * columns
        words = torch.arange(text)[:, None].expand(text, 3)
        image = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        marks = torch.tensor([TEXT] * text + [IMAGE] * rows * columns)
        # On the CPU, as the layout is read from their values.
        return {
            "hidden_states": zeros(model, batch, count, config.in_channels),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, count, config.llm_features_dim),
            "position_ids": torch.cat([words, image + IMAGE_START]).expand(batch, count, 3),
            "segment_ids": torch.ones(batch, count, dtype=torch.long),
            "indicator": marks.expand(batch, count),
        }

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the function from places (B, N, 3) to cosines and sines (B, N, D), which takes
        # its frequencies from the axes in turn.
        embedding = model.rotary_emb

        def forward(self: Any, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            places = position_ids.double()
            origins = places.clamp(max=IMAGE_START)
            frequencies = self.inv_freq.double()
            owner = torch.zeros(len(frequencies), dtype=torch.long)
            for number in (1, 2):
                owner[number : 3 * self.mrope_section[number] : 3] = number
            owner = owner.to(places.device)
            turned = places.new_zeros(*places.shape[:2], len(frequencies))
            amplitudes = torch.ones_like(frequencies)
            for number, axis in enumerate(axes):
                own = owner == number
                parts = places[..., number], frequencies[own], axis, origins[..., number]
                turned[..., own] = angles(*parts)
                amplitudes[own] = 1.0 if axis is None else axis.amplitude
            tables = (amplitudes * wave for wave in (turned.cos(), turned.sin()))
            cosine, sine = (torch.cat([table, table], -1).float() for table in tables)
            return cosine, sine

        embedding.forward = MethodType(forward, embedding)
        try:
            yield
        finally:
            del embedding.forward


def _text_before(indicator: Tensor) -> int:
    """Returns how many tokens stand before the image, which is the last, in all samples alike."""
    is_image = (indicator == IMAGE).cpu()
    count = int((~is_image[0]).sum())
    if is_image[:, :count].any() or not is_image[:, count:].all():
        raise LayoutUnknown("indicator does not put the image last in all samples alike")
    return count
