"""Draws clips, encodes them with the frozen autoencoder and keeps the latents on disk."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from embedded.training.workers import in_processes
from embedded.video.clips import Actor, Clip, every_clip, every_close_up, render_clip
from embedded.video.vae import to_video

PARTS = 3  # chunks in which every object does every motion once
KINDS = {"clips": (31, every_clip), "close-ups": (37, every_close_up)}  # seed and source


@dataclass(frozen=True, slots=True)
class ClipLatents:
    """Encoded clips with what is needed to word their captions.

    Attributes:
        latents: (K, C, F, h, w), fp16, normalised to about unit variance.
        clips: The K clips.
    """

    latents: Tensor
    clips: list[Clip]


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Encodes (B, 3, F, H, W) in [-1, 1] to normalised latents (B, C, f, h, w)."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(videos).latent_dist.mode() - mean) / deviation


def load_latents(
    cast: tuple[Actor, ...], vae: AutoencoderKLWan, kind: str, chunks: int, work: Path
) -> ClipLatents:
    """Loads the first chunks of a kind, drawing those that are missing."""
    draw_chunks(cast, vae, kind, chunks, work)
    found = [torch.load(_path(work, kind, i), weights_only=False) for i in range(chunks)]
    return ClipLatents(
        torch.cat([part.latents for part in found]),
        [clip for part in found for clip in part.clips],
    )


def draw_chunks(
    cast: tuple[Actor, ...], vae: AutoencoderKLWan, kind: str, chunks: int, work: Path
) -> None:
    """Draws those of the first chunks that are missing, one per processor core."""
    missing = [index for index in range(chunks) if not _path(work, kind, index).exists()]
    in_processes(draw_chunk, [(cast, vae, kind, index, work) for index in missing])


def draw_chunk(
    cast: tuple[Actor, ...], vae: AutoencoderKLWan, kind: str, index: int, work: Path
) -> None:
    """Draws and encodes one chunk of a kind of `KINDS`, unless its file exists."""
    path = _path(work, kind, index)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    seed, source = KINDS[kind]
    clips = source(random.Random(seed * 10_000 + index // PARTS), cast)[index % PARTS :: PARTS]
    latents = [encode_clips(vae, to_video(render_clip(cast, clip)[None])).half() for clip in clips]
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(ClipLatents(torch.cat(latents), clips), partial)
    partial.rename(path)


def _path(work: Path, kind: str, index: int) -> Path:
    return work / "latents" / f"{kind}-{index:03d}.pt"
