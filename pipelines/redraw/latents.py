"""How pipelines arrange the latents that they denoise, and how an autoencoder gets there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Arrangement = Literal["plain", "tokens", "quads", "patches", "frames-first", "channels-last"]
STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


@dataclass(frozen=True, slots=True)
class LatentCodec:
    """From pixels to the latents of one pipeline.

    Attributes:
        arrangement: How the pipeline holds (B, C, h, w) or (B, C, F, h, w): as they are; as tokens
            (B, N, C) (Fibo); as tokens (B, N, 4 C) of 2 x 2 elements (FLUX); as tokens of the
            denoiser's own patches (LTX); as (B, F, C, h, w) (CogVideoX); as (B, F, h, w, C)
            (Kandinsky 5).
        patches_channels: Whether 2 x 2 elements are channels (B, 4 C, h / 2, w / 2) before they
            are normalised by the autoencoder's batch norm (FLUX.2).
        scale: Factor beside those that the autoencoder's configuration names.
        statistics: Settings of the autoencoder, some of `STATISTICS`, that the pipeline undoes
            before it decodes; others have values too, which it passes over.
    """

    arrangement: Arrangement = "plain"
    patches_channels: bool = False
    scale: float = 1.0
    statistics: tuple[str, ...] = STATISTICS

    def __post_init__(self) -> None:
        if self.arrangement not in get_args(Arrangement):
            raise ValueError(
                f"arrangement must be one of {', '.join(get_args(Arrangement))}, got "
                f"arrangement={self.arrangement!r}"
            )

    @torch.no_grad()
    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Encodes pixels to normalised latents, fp32.

        Args:
            vae: The pipeline's autoencoder.
            pixels: (B, 3, H, W) or (B, 3, F, H, W) in [-1, 1].

        Returns:
            (B, C, h, w) or (B, C, F, h, w).
        """
        is_clip = pixels.ndim == 5
        takes_clips = "temperal_downsample" in vae.config or any(
            weight.ndim == 5 for weight in vae.parameters()
        )
        if is_clip and not takes_clips:  # frames are coded one by one
            frames = self.encode(vae, pixels.transpose(1, 2).flatten(0, 1))
            return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2)
        given = pixels if is_clip or not takes_clips else pixels[:, :, None]
        if vae.config.get("in_channels") == 4:  # with an alpha channel (Qwen-Image 2.1): opaque
            given = torch.cat([given, torch.ones_like(given[:, :1])], 1)
        (found,) = vae.encode(given.to(device=vae.device, dtype=vae.dtype), return_dict=False)
        latents = found if isinstance(found, Tensor) else found.mode()
        latents = self.normalised(vae, latents.float())
        return latents[:, :, 0] if takes_clips and not is_clip else latents

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        """Scales what an autoencoder encodes to what a denoiser expects."""
        config = vae.config
        if self.patches_channels:
            latents = quads_as_channels(latents)
            norm = vae.bn
            mean, variance = (
                x.view(1, -1, 1, 1).to(latents) for x in (norm.running_mean, norm.running_var)
            )
            return (latents - mean) / (variance + config.batch_norm_eps).sqrt()
        mean, std, scale, shift = (
            _statistics(vae, name) if name in self.statistics else None for name in STATISTICS
        )
        factor = self.scale if scale is None else self.scale * float(scale)
        if mean is None or std is None:
            return (latents - (0.0 if shift is None else float(shift))) * factor
        mean, std = (_along(latents, values) for values in (mean, std))
        return (latents - mean) * factor / std

    def pack(self, latents: Tensor, model: Any) -> Tensor:
        """Arranges normalised latents as the pipeline holds them.

        Args:
            latents: (B, C, h, w) or (B, C, F, h, w).
            model: The denoiser, whose patches may count.
        """
        if self.patches_channels or self.arrangement == "tokens":
            return latents.flatten(2).mT
        if self.arrangement == "quads":
            return quads_as_channels(latents).flatten(2).mT
        if self.arrangement == "patches":
            return _patches(latents, model.config.patch_size, model.config.patch_size_t)
        if self.arrangement == "frames-first":
            return latents.transpose(1, 2)
        return latents.movedim(1, -1) if self.arrangement == "channels-last" else latents

    def part_like(self, latents: Tensor, packed: Tensor) -> Tensor:
        """Views the part of a pipeline's latents that others of its arrangement stand for.

        That is without the first frames or tokens, where a given picture decides them, and without
        the last channels, where the pipeline adds some.

        Args:
            latents: As the pipeline holds them.
            packed: The others, at most as large.
        """
        is_clip = packed.ndim == 5
        if latents.ndim != packed.ndim or not (is_clip or self.arrangement == "patches"):
            return latents
        channels = {"plain": 1, "frames-first": 2}.get(self.arrangement, latents.ndim - 1)
        for axis in (channels, 2 if channels == 1 else 1):
            length = min(packed.shape[axis], latents.shape[axis])
            start = 0 if axis == channels else latents.shape[axis] - length
            latents = latents.narrow(axis, start, length)
        return latents

    def unpack(self, packed: Tensor, like: Tensor, model: Any) -> Tensor:
        """Undoes `pack`.

        Args:
            packed: As the pipeline holds them.
            like: Latents of the shape that is wanted.
            model: The denoiser.
        """
        if packed.shape == like.shape:
            return packed
        # All arrangements only move elements: where each goes is seen once, on their numbers.
        numbers = torch.arange(like[:1].numel(), device=packed.device).view(like[:1].shape)
        order = self.pack(numbers, model).flatten()
        found = torch.empty(len(packed), order.numel(), device=packed.device, dtype=packed.dtype)
        found[:, order] = packed.flatten(1)
        return found.view(len(packed), *like.shape[1:])


def _along(latents: Tensor, values: Tensor) -> Tensor:
    """Statistics of each channel, or of each channel and latent frame, as latents broadcast."""
    if latents.ndim < 5:
        return values.view(1, -1, *(1,) * (latents.ndim - 2)).to(latents)
    shaped = values.view(1, latents.shape[1], -1, 1, 1).to(latents)
    return shaped[:, :, : latents.shape[2]]


def quads_as_channels(latents: Tensor) -> Tensor:
    """Moves 2 x 2 elements of (B, C, h, w) to (B, 4 C, h / 2, w / 2)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2)


def _patches(latents: Tensor, side: int, frames: int) -> Tensor:
    """Moves patches of (B, C, F, h, w) to tokens (B, N, C * patch)."""
    batch, channels, length, height, width = latents.shape
    parts = latents.reshape(
        batch, channels, length // frames, frames, height // side, side, width // side, side
    )
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def _statistics(vae: Any, name: str) -> Tensor | None:
    """One of `STATISTICS`, which autoencoders keep as buffers or in their settings."""
    value = vae.config.get(name)
    if value is None:
        value = dict(vae.named_buffers()).get(name)
    return None if value is None else torch.as_tensor(value, dtype=torch.float32)
