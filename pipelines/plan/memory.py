"""Estimates the memory that a generation takes at its peak: a rough sum of its largest parts."""

from __future__ import annotations

import torch

from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.tiling import TILE
from diffaccel.pipelines.plan.operations import ServedLayer
from diffaccel.pipelines.plan.skeleton import Outline

PROGRAM = 600e6
"""Bytes of Python with PyTorch, diffusers and transformers on a CPU; about a context on a GPU."""

ROWS_PER_TOKEN = 14
"""Tensors of tokens x width that are alive at the widest point of a transformer block: the
residual, its norm, query, key, value (twice where they are reordered), output, and a hidden layer
of four times the width with room for its activation."""

PICTURES = 4
"""Copies of the decoded picture in fp32: tiles, rows, the whole, the array that is returned."""


def weights_memory(outline: Outline, dtype: torch.dtype) -> float:
    """Bytes of the weights of everything that is loaded."""
    parameters = sum(p.numel() for m in outline.modules.values() for p in m.parameters())
    return float(parameters * dtype.itemsize)


def tokens_memory(layers: tuple[ServedLayer, ...], dtype: torch.dtype, batch: int) -> float:
    """Bytes of the widest attention block of a denoiser."""
    widest = max(s.layout.length * s.heads * s.dim for s in layers)
    return float(ROWS_PER_TOKEN * batch * widest * dtype.itemsize)


def image_memory(
    outline: Outline,
    job: ImageJob,
    layers: tuple[ServedLayer, ...],
    dtype: torch.dtype,
    is_refined: bool,
) -> float:
    """Bytes at the peak of one stage of `generate_image`, all components on one device.

    Args:
        outline: The pipeline.
        job: The stage.
        layers: The denoiser's attention layers at that size.
        dtype: Of weights and activations.
        is_refined: Whether the stage starts from a picture.
    """
    preset, size = job.preset, job.size
    picture = 3.0 * size[0] * size[1] * 4
    # true_cfg_scale runs both prompts one after the other, guidance_scale as one batch
    is_sequential = "true_cfg_scale" in preset.arguments
    batch = 1 if is_sequential else (preset.refine_passes if is_refined else preset.passes)
    held = 2 * picture if is_refined else 0.0  # what the stage starts from
    denoising = held + tokens_memory(layers, dtype, batch)
    decoding = held + PICTURES * picture + _tile_memory(outline, size)
    return PROGRAM + weights_memory(outline, dtype) + max(denoising, decoding)


def _tile_memory(outline: Outline, size: tuple[int, int]) -> float:
    """Bytes of decoding one tile in fp32, at the full resolution of the last block."""
    channels = outline.modules["vae"].config.get("block_out_channels") or (96, 192)
    pixels = min(size[0], TILE) * min(size[1], TILE)
    first, second = channels[0], channels[min(1, len(channels) - 1)]
    return 4.0 * pixels * (second + 3 * first)
