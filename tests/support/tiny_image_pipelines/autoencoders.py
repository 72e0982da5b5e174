"""Tiny autoencoders of each class, every statistic that they can have told and not neutral."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_models.base import built


def statistics(channels: int) -> dict[str, list[float]]:
    """Means and deviations of latents."""
    places = torch.arange(channels)
    return {
        "latents_mean": (0.3 * torch.cos(places)).tolist(),
        "latents_std": (1.0 + 0.4 * torch.sin(places)).tolist(),
    }


def kl(channels: int = 4) -> Any:
    """The autoencoder of Stable Diffusion and FLUX, 8 pixels per element."""
    return built(
        diffusers.AutoencoderKL, latent_channels=channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=2, mid_block_add_attention=False,
        scaling_factor=0.6, shift_factor=0.3, **statistics(channels),
    )  # fmt: skip


def deep(channels: int = 4) -> Any:
    """The deep compression autoencoder, 32 pixels per element."""
    return built(
        diffusers.AutoencoderDC, latent_channels=channels, attention_head_dim=2,
        encoder_block_out_channels=(4,) * 6, decoder_block_out_channels=(4,) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.6,
    )  # fmt: skip


def flux2(channels: int = 4) -> Any:
    """That of FLUX.2, whose batch norm holds the statistics of 2 x 2 elements."""
    vae = built(
        diffusers.AutoencoderKLFlux2, latent_channels=channels, layers_per_block=1,
        block_out_channels=(4,) * 4, norm_num_groups=2, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.copy_(0.3 * torch.cos(torch.arange(4 * channels)))
    vae.bn.running_var.copy_(1.0 + 0.4 * torch.sin(torch.arange(4 * channels)))
    return vae


def hunyuan(channels: int = 4) -> Any:
    """That of HunyuanImage, 32 pixels per element."""
    return built(
        diffusers.AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, sample_size=64,
        latent_channels=channels, block_out_channels=(32,) * 6, layers_per_block=1,
        spatial_compression_ratio=32, scaling_factor=0.6,
    )  # fmt: skip


def qwen(channels: int) -> Any:
    """That of Qwen-Image, 8 pixels per element."""
    return built(
        diffusers.AutoencoderKLQwenImage, base_dim=4, z_dim=channels, dim_mult=[1] * 4,
        num_res_blocks=1, **statistics(channels),
    )  # fmt: skip


def qwen21(channels: int) -> Any:
    """That of Qwen-Image 2.1, 16 pixels per element, with an alpha channel."""
    return built(
        diffusers.AutoencoderKLQwenImage21, base_dim=4, decoder_base_dim=4, z_dim=channels,
        dim_mult=[1] * 5, num_res_blocks=1, **statistics(channels),
    )  # fmt: skip


def wan(channels: int) -> Any:
    """That of Wan 2.2, 16 pixels per element, of which 2 are channels."""
    return built(
        diffusers.AutoencoderKLWan, base_dim=4, decoder_base_dim=4, z_dim=channels,
        dim_mult=[1] * 4, num_res_blocks=1, is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, **statistics(channels),
    )  # fmt: skip
