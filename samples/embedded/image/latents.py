"""Draws scenes, encodes them with the frozen autoencoder and keeps the latents on disk."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from embedded.image.vae import to_tensor
from embedded.scenes import Scene, Window, random_scene, random_window, render
from embedded.training.workers import in_processes
from embedded.vocabulary import Thing

GROUP = 6  # close-ups that share a window, so that they fit into one batch


@dataclass(frozen=True, slots=True)
class PoolKind:
    """A kind of training pictures.

    Attributes:
        name: Name of its files.
        pixels: Side of the pictures.
        close_ups: Whether pictures are windows of scenes at up to 16 times the size.
        seed: Seed of the scenes.
        variety: How far places and sizes of the objects vary, see `random_scene`.
        shares: How often scenes have one, two and three objects.
        main_only: Whether they show the main objects alone, see `random_scene`.
        pictures: Pictures of a chunk, whole groups of close-ups.
    """

    name: str
    pixels: int
    close_ups: bool
    seed: int
    variety: float = 1.0
    shares: tuple[float, float, float] = (0.6, 0.28, 0.12)
    main_only: bool = False
    pictures: int = 600


@dataclass(frozen=True, slots=True)
class Chunk:
    """Encoded pictures with what is needed to word their captions.

    Attributes:
        latents: Packed latents (K, N, 32), fp16, normalised to about unit variance.
        scenes: The K scenes.
        windows: The K windows that they show.
    """

    latents: Tensor
    scenes: list[Scene]
    windows: list[Window]


def pack(latents: Tensor) -> Tensor:
    """Arranges latents (B, 8, h, w) as tokens (B, h / 2 * w / 2, 32), as FluxPipeline does."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def token_positions(pixels: int, window: Window | None = None) -> Tensor:
    """Places tokens on the grid that they have at 256 px, or at their window's larger size.

    Args:
        pixels: Side of the picture; below 256 the positions are spread over the same grid.
        window: The part of a larger picture that a close-up shows.

    Returns:
        (N, 3) float32: zero, row, column.
    """
    side = pixels // 16
    stretch = 16 / side if pixels < 256 else 1.0
    axis = torch.arange(side) * stretch + (stretch - 1) / 2
    window = window or Window()
    rows = axis + round(window.y * 16 / window.size)
    columns = axis + round(window.x * 16 / window.size)
    positions = torch.zeros(side, side, 3)
    positions[..., 1] = rows[:, None]
    positions[..., 2] = columns[None]
    return positions.view(-1, 3)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encodes (B, 3, H, W) pictures in [-1, 1] to packed, normalised latents."""
    latents = vae.encode(pictures).latent_dist.mode()
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


def chunk_path(work: Path, kind: PoolKind, index: int) -> Path:
    """Names the file of a chunk."""
    return work / "latents" / f"{kind.name}-{index:03d}.pt"


def draw_chunk(
    vocabulary: tuple[Thing, ...],
    vae: AutoencoderKL,
    kind: PoolKind,
    index: int,
    work: Path,
) -> None:
    """Draws and encodes one chunk of pictures, unless its file exists."""
    path = chunk_path(work, kind, index)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(kind.seed * 10_000 + index)
    scenes, windows, encoded = [], [], []
    window = Window()
    for place in range(kind.pictures):
        scene = random_scene(rng, vocabulary, kind.shares, kind.variety, kind.main_only)
        if kind.close_ups and place % GROUP == 0:
            window = random_window(rng, scene, rng.choice((2, 2, 3, 4, 4, 6, 8, 12, 16)))
        picture = to_tensor(render(vocabulary, scene, kind.pixels, window)[None])
        scenes.append(scene)
        windows.append(window)
        encoded.append(encode_pictures(vae, picture).half())
    partial = path.with_suffix(f".{os.getpid()}")
    content = {"latents": torch.cat(encoded), "scenes": scenes, "windows": windows}
    torch.save(content, partial)
    partial.rename(path)


def draw_chunks(
    vocabulary: tuple[Thing, ...], vae: AutoencoderKL, kind: PoolKind, count: int, work: Path
) -> None:
    """Draws those of the first `count` chunks that are missing, one per processor core."""
    missing = [index for index in range(count) if not chunk_path(work, kind, index).exists()]
    in_processes(draw_chunk, [(vocabulary, vae, kind, index, work) for index in missing])


def load_chunk(work: Path, kind: PoolKind, index: int) -> Chunk:
    """Reads a chunk that `draw_chunk` wrote."""
    return Chunk(**torch.load(chunk_path(work, kind, index), weights_only=False))
