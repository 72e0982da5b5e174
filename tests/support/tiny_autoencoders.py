"""Tiny autoencoders of videos with random weights, by model; some with statistics."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_models.base import built

SIDES = (4, 4, 4, 4)


def hunyuan() -> Any:
    """Of HunyuanVideo: 4 frames and 8 x 8 pixels."""
    return built(
        diffusers.AutoencoderKLHunyuanVideo, latent_channels=4, block_out_channels=SIDES,
        layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False, scaling_factor=0.5,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip


def cogvideox() -> Any:
    """Of CogVideoX: 4 frames and 8 x 8 pixels."""
    return built(
        diffusers.AutoencoderKLCogVideoX, latent_channels=4, block_out_channels=SIDES,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip


def ltx() -> Any:
    """Of LTX-Video: 8 frames and 32 x 32 pixels, statistics that are not neutral."""
    vae = built(
        diffusers.AutoencoderKLLTXVideo, latent_channels=8, block_out_channels=SIDES,
        layers_per_block=(1,) * 5, decoder_block_out_channels=SIDES,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5, scaling_factor=0.8, encoder_causal=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vae.latents_mean.copy_(torch.randn(8, generator=generator))
    vae.latents_std.copy_(torch.rand(8, generator=generator) + 0.5)
    return vae


def hunyuan_15() -> Any:
    """Of HunyuanVideo 1.5: 4 frames and 16 x 16 pixels."""
    return built(
        diffusers.AutoencoderKLHunyuanVideo15, latent_channels=4, block_out_channels=(8,) * 5,
        layers_per_block=1, scaling_factor=0.6,
    )  # fmt: skip


def magvit() -> Any:
    """Of EasyAnimate: 4 frames and 8 x 8 pixels."""
    return built(
        diffusers.AutoencoderKLMagvit, latent_channels=4, block_out_channels=SIDES,
        layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip


def wan(channels: int = 16) -> Any:
    """Of Wan and SkyReels-V2: 4 frames and 8 x 8 pixels."""
    values = {}
    if channels != 16:
        values = {"latents_mean": [0.1] * channels, "latents_std": [0.9] * channels}
    return built(
        diffusers.AutoencoderKLWan, base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1],
        num_res_blocks=1, temperal_downsample=[False, True, True], **values,
    )  # fmt: skip


def qwen() -> Any:
    """Of Qwen-Image, of one frame: 8 x 8 pixels."""
    return built(
        diffusers.AutoencoderKLQwenImage, base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1],
        num_res_blocks=1, temperal_downsample=[False, True, True], latents_mean=[0.1] * 4,
        latents_std=[0.9] * 4,
    )  # fmt: skip


def mochi() -> Any:
    """Of Mochi: 6 frames and 8 x 8 pixels; the pipeline takes 12 channels, norms 32."""
    return built(
        diffusers.AutoencoderKLMochi, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip


def cosmos() -> Any:
    """Of Cosmos 1: 8 frames and 8 x 8 pixels, statistics of each channel and latent frame."""
    return built(
        diffusers.AutoencoderKLCosmos, latent_channels=4, encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4, attention_resolutions=(8,), resolution=64,
        num_layers=1, patch_size=4, latents_mean=[0.1, -0.1, 0.2, 0.0] * 4,
        latents_std=[0.9, 1.1, 0.8, 1.0] * 4,
    )  # fmt: skip


def ltx2() -> Any:
    """Of LTX-2: 8 frames and 32 x 32 pixels, statistics that are not neutral."""
    vae = built(
        diffusers.AutoencoderKLLTX2Video, latent_channels=8, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4, encoder_causal=True, decoder_causal=False,
        scaling_factor=0.8, spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vae.latents_mean.copy_(torch.randn(8, generator=generator))
    vae.latents_std.copy_(torch.rand(8, generator=generator) + 0.5)
    return vae


def ltx2_sound() -> Any:
    """Of the sound of LTX-2: 2 channels of 2 bins, statistics that are not neutral."""
    vae = built(
        diffusers.AutoencoderKLLTX2Audio, base_channels=4, ch_mult=(1, 2, 4), num_res_blocks=1,
        latent_channels=2, mel_bins=8, resolution=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vae.latents_mean.copy_(torch.randn(vae.latents_mean.shape, generator=generator))
    vae.latents_std.copy_(torch.rand(vae.latents_std.shape, generator=generator) + 0.5)
    return vae
