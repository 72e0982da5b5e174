"""Bindings of FLUX.1 and of what descends from it: packed images, text first."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.bindings.position_ids import image_grids, scaled_embedding
from diffaccel.layout import Grid, Segment, TokenLayout


class FluxBinding(Binding):
    """FLUX.1: text first, then the image, then reference images (Kontext).

    Latents arrive packed; only the position ids, (tokens, 3) with (image, row, column), tell the
    grid. They are read once for each tensor, one wait for the device in a run. LongCat-Image and
    Ovis-Image are called in the same way.

    Args:
        name: The model family.
    """

    patterns: tuple[tuple[str, str], ...] = (
        (r"(single_)?transformer_blocks\.\d+\.attn", "joint"),
    )
    block_outputs: tuple[str, ...] = ("encoder_hidden_states", "hidden_states")
    scales_rope = True
    id_axes = 3
    """Axes of the position ids."""
    patch = 2
    """Latent elements along a side of a token."""

    def __init__(self, name: str = "flux") -> None:
        self.name = name

    def family(self, model: Any, pipe: Any) -> str:
        return self.name

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        images = call.read(call["img_ids"], image_grids)
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((text, *target_and_references(images)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        rows, columns = (side // self.patch for side in latents)
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, rows * columns, config.in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.joint_attention_dim),
            "timestep": zeros(model, batch),
            # On the CPU, as the layout is read from their values.
            "img_ids": image_ids(rows, columns, self.id_axes),
            "txt_ids": torch.zeros(text, self.id_axes),
        }
        if config.get("pooled_projection_dim"):
            call["pooled_projections"] = zeros(model, batch, config.pooled_projection_dim)
        return call | ({"guidance": zeros(model, batch)} if config.get("guidance_embeds") else {})

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        return scaled_embedding(model.pos_embed, axes)


class LongCatImageBinding(FluxBinding):
    """LongCat-Image: FLUX without pooled prompts."""

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        call = super().example_call(model, latents, text, batch)
        del call["pooled_projections"]
        return call


class ChromaBinding(FluxBinding):
    """Chroma: FLUX with a mask over text.

    The mask of the stock pipelines holds ones and zeros as floats, which are added to the scores
    of a query and a key whose mask is one: padding of the text stays, less by one. A bool mask is
    key padding.
    """

    mixes_text = r"single_transformer_blocks\..+"
    one_prompt = "its prompt is more than one argument of a call"

    def written_mask(self, call: ModelCall) -> Tensor | None:
        return call.arguments.get("attention_mask")

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        call = super().example_call(model, latents, text, batch)
        tokens = text + call["hidden_states"].shape[1]
        return call | {"attention_mask": zeros(model, batch, tokens) == 0}


class Flux2Binding(FluxBinding):
    """FLUX.2: text, the image, reference images; ids have (image, row, column, text token).

    Klein with cached references puts these between text and image, and lets them attend to
    themselves alone at the first step; then it passes their keys and values on.
    """

    attends_text_apart = True
    mixes_text = r"single_transformer_blocks\..+"
    id_axes = 4

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        mode, cache = call.arguments.get("kv_cache_mode"), call.arguments.get("kv_cache")
        images = call.read(call["img_ids"], image_grids)
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        if mode == "cached" and cache is not None:
            target, *_ = target_and_references(images)
            return TokenLayout((text, Segment("condition", cache.num_ref_tokens), target))
        if mode == "extract" and call.arguments.get("num_ref_tokens", 0) > 0:
            target, *references = target_and_references([images[-1], *images[:-1]])
            return TokenLayout((text, *references, target))
        return TokenLayout((text, *target_and_references(images)))


class Flux3Binding(FluxBinding):
    """FLUX.3: blocks of the image alone, then text, the image and reference images together."""

    patterns = (
        (r"single_transformer_blocks\.\d+\.attn", "joint"),
        (r"mode_blocks\.image\.\d+\.attn", "self"),
    )
    stacks = ("mode_blocks", "single_transformer_blocks")
    id_axes = 4

    def skip_reason(self, name: str) -> str:
        if name.startswith("txt_mode_blocks"):
            return "text attends to itself"
        return "reference images attend to themselves"

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        images = call.read(call["img_ids"], image_grids)
        if layer.kind == "self":
            return TokenLayout(target_and_references(images))
        ids = call.arguments.get("image_cond_ids")
        references = [] if ids is None else call.read(ids, image_grids)
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((text, *target_and_references([*images, *references])))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        call = super().example_call(model, latents, text, batch)
        return call | ({"target_timestep": zeros(model, batch)} if model.config.flow_map else {})


class Krea2Binding(FluxBinding):
    """Krea 2: text first, whose padding the attention mask excludes, then the image."""

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("hidden_states",)
    mixes_text = r"transformer_blocks\..+"
    one_prompt = "its prompt is more than one argument of a call"

    def skip_reason(self, name: str) -> str:
        return "text token refiner"

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        text = call["encoder_hidden_states"].shape[1]

        def grids(ids: Tensor) -> list[tuple[int, int, int]]:
            return image_grids(ids[text:])

        images = call.read(call["position_ids"], grids)
        return TokenLayout((Segment("text", text), *target_and_references(images)))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        rows, columns = (side // self.patch for side in latents)
        config = model.config
        text_size = (text, config.num_text_layers, config.text_hidden_dim)
        return {
            "hidden_states": zeros(model, batch, rows * columns, config.in_channels),
            "encoder_hidden_states": zeros(model, batch, *text_size),
            "timestep": zeros(model, batch),
            "position_ids": torch.cat([torch.zeros(text, 3), image_ids(rows, columns, 3)]),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        return scaled_embedding(model.rotary_emb, axes)


def image_ids(rows: int, columns: int, axes: int) -> Tensor:
    """Returns position ids (rows * columns, axes) of one image: 0, row, column, and zeros."""
    sides = (1, rows, columns, 1)[:axes]
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in sides))
