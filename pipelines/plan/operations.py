"""How much a denoiser or an autoencoder computes, counted by PyTorch on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.bindings import AttentionLayer, ModelCall, binding_of
from diffaccel.errors import InputError
from diffaccel.layout import TokenLayout


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


def served_layers(model: Any, latents: tuple[int, ...], text: int) -> tuple[ServedLayer, ...]:
    """Lists the attention layers that a method may serve, with their tokens.

    Args:
        model: A denoiser, on any device.
        latents: Its latents (h, w), or (f, h, w) of a video.
        text: Text tokens, joint or cross-attended.
    """
    model = skeleton_of(model)
    binding = binding_of(model)
    call = ModelCall(binding.example_call(model, latents, text), {})
    found = []
    for layer in binding.layers(model):
        module = model.get_submodule(layer.name)
        layout = binding.layout(model, call, layer)
        layout = TokenLayout(layout.segments, binding.native(model, layer))
        dim = getattr(module, "head_dim", None) or module.inner_dim // module.heads
        found.append(ServedLayer(layer, layout, module.heads, dim))
    return tuple(found)


def other_flop(model: Any, latents: tuple[int, ...], text: int) -> float:
    """Operations of one call on one sample, apart from the attention that a method may serve.

    Matrix products, convolutions and cross-attention; norms and the like are left out.

    Args:
        model: A denoiser, on any device.
        latents: Its latents (h, w), or (f, h, w) of a video.
        text: Text tokens, joint or cross-attended.

    Raises:
        InputError: The denoiser does not take latents of this size.
    """
    model = skeleton_of(model)
    call = binding_of(model).example_call(model, latents, text)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**call)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{type(model).__name__} must take latents of {'x'.join(map(str, latents))} elements, "
            f"it does not ({str(error).splitlines()[0]}); choose another size"
        ) from error
    served = sum(layer.dense_flop for layer in served_layers(model, latents, text))
    return counter.get_total_flops() - served


def autoencoder_flop(vae: Any, tiles: Mapping[tuple[int, int], int], part: str) -> float:
    """Operations that encode or decode one picture in tiles.

    Args:
        vae: An `AutoencoderKL` on the meta device.
        tiles: Sizes (width, height) in pixels of the tiles, with their numbers.
        part: "encode" or "decode".
    """
    config = vae.config
    channels, scale = config.in_channels, 1
    if part == "decode":
        channels, scale = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
    total = 0.0
    for (width, height), count in tiles.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            getattr(vae, part)(
                torch.empty(1, channels, height // scale, width // scale, device="meta")
            )
        total += count * counter.get_total_flops()
    return total


def skeleton_of(model: Any) -> Any:
    """Returns a denoiser on the meta device, where calls compute nothing: a twin if need be."""
    if model.device.type == "meta":
        return model
    with torch.device("meta"):
        return type(model).from_config(model.config)
