"""How much a denoiser or an autoencoder computes, counted from the shapes of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from diffaccel.bindings import AttentionLayer, Binding, ModelCall, binding_of
from diffaccel.layout import TokenLayout
from diffaccel.pipelines.image.tiling import OVERLAP, TILE

_PER_SAMPLE = ("time", "guidance", "pooled", "norm", "add_embedding", "_mod.", "vector_in")
_TEXT = ("context", "text_embedder", "caption_projection", ".add_", "to_add_out", "txt_")


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """One attention layer that a method may serve, at one size.

    Args:
        layer: Which.
        layout: Its tokens.
        heads: H.
        dim: D.
    """

    layer: AttentionLayer
    layout: TokenLayout
    heads: int
    dim: int

    @property
    def dense_flop(self) -> float:
        """Operations of dense attention on one sample: 2 D for the scores, 2 D for the sum."""
        return 4.0 * self.layout.length**2 * self.heads * self.dim


def served_layers(
    model: nn.Module, latents: tuple[int, ...], text: int
) -> tuple[ServedLayer, ...]:
    """Lists the attention layers that a method may serve, with their tokens.

    Args:
        model: A denoiser, on any device.
        latents: Its latents (h, w), or (f, h, w) of a video.
        text: Text tokens of joint sequences.
    """
    binding = binding_of(model)
    call = _call(latents, text)
    found = []
    for layer in binding.layers(model):
        module = model.get_submodule(layer.name)
        layout = binding.layout(model, call, layer)
        layout = TokenLayout(layout.segments, binding.native(model, layer))
        found.append(ServedLayer(layer, layout, module.heads, module.inner_dim // module.heads))
    return tuple(found)


def other_flop(
    model: nn.Module, latents: tuple[int, ...], visual: int, text: int, cross: int
) -> float:
    """Operations of all matrix products and convolutions of one call on one sample.

    Counted from the shapes of weights: 2 for each weight and position. Attention itself, norms
    and the like are left out.

    Args:
        model: A denoiser.
        latents: Its latents (h, w), or (f, h, w) of a video.
        visual: Visual tokens of a transformer.
        text: Text tokens of joint sequences.
        cross: Text tokens that are cross-attended.
    """
    binding = binding_of(model)
    own = {layer.name for layer in binding.layers(model)}
    is_unet = hasattr(model, "down_blocks")
    total = 0.0
    for name, weight in _products(model):
        if any(word in name for word in _PER_SAMPLE):
            count = 1
        elif name.endswith((".to_k", ".to_v")) and name.rpartition(".")[0] not in own and cross:
            count = cross
        elif is_unet:
            count = _unet_positions(binding, model, name, latents)
        elif any(word in name for word in _TEXT):
            count = text or cross
        elif name.startswith("single_transformer_blocks"):
            count = visual + text
        else:
            count = visual
        total += 2.0 * weight * count
    return total


def autoencoder_flop(vae: nn.Module, width: int, height: int, part: str) -> float:
    """Operations of the convolutions that encode or decode one picture in tiles.

    Args:
        vae: An `AutoencoderKL`.
        width: In pixels.
        height: In pixels.
        part: "encoder" or "decoder".
    """
    deepest = len(vae.config.block_out_channels) - 1
    repeated = 1.0 if max(width, height) <= TILE else 1.0 / (1.0 - OVERLAP) ** 2
    total = 0.0
    for name, weight in _products(getattr(vae, part)):
        place, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        level = 0 if place == ("conv_in" if part == "encoder" else "conv_out") else deepest
        if place == "down_blocks":
            level = int(number) + (".downsamplers." in name)
        if place == "up_blocks":
            level = deepest - int(number) - (".upsamplers." in name)
        total += 2.0 * weight * width * height / 4**level
    return total * repeated


def _products(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the layers that multiply, with the number of their weights."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            yield name, module.weight.numel()


def _unet_positions(
    binding: Binding, model: nn.Module, name: str, latents: tuple[int, ...]
) -> int:
    level = 0
    if name.startswith(("down_blocks", "mid_block", "up_blocks")):
        level = binding.level(model, name)
    level += (".downsamplers." in name) - (".upsamplers." in name)
    height, width = latents
    return ceil(height / 2**level) * ceil(width / 2**level)


def _call(latents: tuple[int, ...], text: int) -> ModelCall:
    """What any denoiser would be called with, for `Binding.layout`, which reads shapes."""
    height, width = latents[-2:]
    rows, columns = height // 2, width // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    arguments: dict[str, Any] = {
        "hidden_states": torch.empty(1, 1, *latents, device="meta"),
        "sample": torch.empty(1, 1, *latents, device="meta"),
        "encoder_hidden_states": torch.empty(1, text, 1, device="meta"),
        "img_ids": ids.flatten(0, 1),
        "img_shapes": [[(1, rows, columns)]],
    }
    return ModelCall(arguments, {})
