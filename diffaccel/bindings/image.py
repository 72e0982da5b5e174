"""Bindings of image transformers: FLUX.1, Stable Diffusion 3 and Qwen-Image."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from diffaccel.bindings.base import AttentionLayer, Binding, LayoutUnknown, ModelCall, patched
from diffaccel.layout import Grid, Segment, TokenLayout


class FluxBinding(Binding):
    """FLUX.1: text first, then the image, then reference images (Kontext).

    Latents arrive packed; only the position ids, (tokens, 3) with (image, row, column), tell the
    grid. They are read once for each tensor, one wait for the device in a run.
    """

    patterns = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("encoder_hidden_states", "hidden_states")

    def family(self, model: nn.Module, pipe: Any) -> str:
        return "flux"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        return (1, 64, 64)  # 1024 pixels

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        images = call.read(call["img_ids"], image_grids)
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((text, *_target_and_references(images)))


class SD3Binding(Binding):
    """Stable Diffusion 3 and 3.5: the image first, then text; `attn2` sees the image alone."""

    patterns = (
        (r"transformer_blocks\.\d+\.attn", "joint"),
        (r"transformer_blocks\.\d+\.attn2", "self"),
    )
    block_outputs = ("encoder_hidden_states", "hidden_states")
    batches_prompts = True

    def family(self, model: nn.Module, pipe: Any) -> str:
        return "sd3"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        size = model.config.sample_size
        return None if size is None else (1, *(size // model.config.patch_size,) * 2)

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        height, width = call["hidden_states"].shape[-2:]
        patch = model.config.patch_size
        text = call["encoder_hidden_states"].shape[1] if layer.kind == "joint" else 0
        return TokenLayout.image(patched(height, patch), patched(width, patch), text_after=text)


class QwenImageBinding(Binding):
    """Qwen-Image: text first, then the image, then the images to edit."""

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    block_outputs = ("encoder_hidden_states", "hidden_states")

    def family(self, model: nn.Module, pipe: Any) -> str:
        return "qwen"

    def native(self, model: nn.Module, layer: AttentionLayer) -> Grid | None:
        return (1, 83, 83)  # 1328 pixels

    def layout(self, model: nn.Module, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        # One entry per sample; the model itself takes the first for all. An entry is a list of
        # (frames, height, width), or a single one (ControlNet pipelines).
        images = call["img_shapes"][0]
        images = images if isinstance(images, list) else [images]
        text = Segment("text", call["encoder_hidden_states"].shape[1])
        return TokenLayout((text, *_target_and_references(images)))


def _target_and_references(images: list[tuple[int, int, int]]) -> tuple[Segment, ...]:
    """Describes the image to denoise and the reference images that follow it."""
    kinds = ["visual"] + ["condition"] * (len(images) - 1)
    return tuple(
        Segment(kind, prod(grid), tuple(grid)) for kind, grid in zip(kinds, images, strict=True)
    )


def image_grids(ids: Tensor) -> list[tuple[int, int, int]]:
    """Reads the grids of consecutive images from their FLUX position ids.

    Ids may be scaled (position interpolation) or rounded (bf16 beyond 256): only their order
    counts.

    Args:
        ids: (tokens, 3) or (B, tokens, 3): image index, row, column of each token.

    Returns:
        (1, height, width) of each image; the first is the one to denoise.
    """
    rows = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    starts = [0, *(_changes(rows[:, 0])), len(rows)]
    images = [rows[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
    return [(1, *_raster(image)) for image in images]


def _raster(image: Tensor) -> tuple[int, int]:
    """Returns (height, width) of one image's ids, which must lie in raster order."""
    width = next(iter(_changes(image[:, 1])), len(image))
    if len(image) % width == 0:
        grid = image.reshape(-1, width, 3)
        is_row = (grid[..., 1] == grid[:, :1, 1]).all()
        is_column = (grid[..., 2] == grid[:1, :, 2]).all()
        if is_row and is_column:
            return len(image) // width, width
    raise LayoutUnknown("img_ids do not describe images in raster order")


def _changes(values: Tensor) -> list[int]:
    """Returns the positions at which a value differs from the one before."""
    return (values[1:] != values[:-1]).nonzero().flatten().add(1).tolist()
