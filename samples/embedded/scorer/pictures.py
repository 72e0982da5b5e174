"""Draws the pictures that the scorer learns from: scenes in fours that differ in one respect."""

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.image.vae import to_tensor
from embedded.scenes import (
    Background,
    Scene,
    Window,
    caption,
    random_background,
    random_scene,
    render,
)
from embedded.scorer.model import PIXELS
from embedded.training.workers import in_processes
from embedded.vocabulary import Thing

FOUR = 4  # scenes of a group
SEED = 40_000
SHARES = (0.5, 0.4, 0.1)  # how often scenes have one, two and three objects


@dataclass(frozen=True, slots=True)
class PictureChunk:
    """Pictures and the scenes that they show, in groups of four neighbours.

    Attributes:
        pictures: (K, 64, 64, 3), uint8.
        scenes: The K scenes.
    """

    pictures: Tensor
    scenes: list[Scene]


def scenes_in_fours(rng: random.Random, vocabulary: tuple[Thing, ...]) -> tuple[Scene, ...]:
    """Draws a scene and three that are easily taken for it.

    Returns:
        The scene; with its order reversed, or with another object if it has one; with another
        object, then also on another background if it has one; and on another background.
    """
    scene = random_scene(rng, vocabulary, SHARES, rng.choice((0.0, 1.0, 1.0)))
    things = rng.sample(range(len(vocabulary)), len(scene.objects) + 1)  # each equally often
    scene = _showing(scene, things[:-1])
    elsewhere = replace(scene, background=_another_ground(rng, scene))
    changed = list(things[:-1])
    changed[rng.randrange(len(changed))] = things[-1]
    if len(scene.objects) == 1:
        return scene, _showing(scene, changed), _showing(elsewhere, changed), elsewhere
    return scene, _showing(scene, things[-2::-1]), _showing(scene, changed), elsewhere


def _showing(scene: Scene, things: list[int]) -> Scene:
    """Puts other things into the places of a scene."""
    placed = zip(scene.objects, things, strict=True)
    return replace(scene, objects=tuple(replace(p, thing=thing) for p, thing in placed))


def _another_ground(rng: random.Random, scene: Scene) -> Background:
    """Draws a background with other names."""
    while True:
        ground = random_background(rng)
        if ground.names != scene.background.names:
            return ground


def told_caption(
    rng: random.Random, vocabulary: tuple[Thing, ...], scene: Scene
) -> tuple[str, bool]:
    """Words a caption that is not empty, and says whether it names the background."""
    while True:
        text = caption(rng, vocabulary, scene, Window())
        if text:
            return text, " on " in text


def fitting(scenes: list[Scene], tells_ground: list[bool]) -> Tensor:
    """Which pictures fit which captions, beyond their own.

    Args:
        scenes: What the B pictures show.
        tells_ground: Whether the caption of each names the background.

    Returns:
        (B, B) bool, pictures in rows and captions in columns.
    """
    things = [tuple(placed.thing for placed in scene.objects) for scene in scenes]
    grounds = [scene.background.names for scene in scenes]
    count = len(scenes)
    return torch.tensor(
        [
            [
                things[i] == things[j] and (not tells_ground[j] or grounds[i] == grounds[j])
                for j in range(count)
            ]
            for i in range(count)
        ]
    )


def worn(pictures: Tensor) -> Tensor:
    """Blurs, coarsens, dims and noises pictures at random, as a small generator might.

    Args:
        pictures: (B, 3, 64, 64), values -1 to 1.
    """
    chance = torch.rand(len(pictures), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
    changed = torch.where(chance < 0.3, blurred, torch.where(chance > 0.8, coarse, pictures))
    contrast = 1 + 0.15 * (2 * torch.rand(len(pictures), 1, 1, 1) - 1)
    brightness = 0.15 * (2 * torch.rand(len(pictures), 1, 1, 1) - 1)
    noise = 0.2 * torch.rand(len(pictures), 1, 1, 1) * torch.randn_like(pictures)
    return (contrast * changed + brightness + noise).clamp(-1, 1)


def picture_path(work: Path, index: int) -> Path:
    """Names the file of a chunk."""
    return work / "pictures" / f"scorer-{index:03d}.pt"


def draw_pictures(
    vocabulary: tuple[Thing, ...], index: int, work: Path, groups: int = 1000
) -> None:
    """Draws one chunk of groups of four, unless its file exists."""
    path = picture_path(work, index)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED + index)
    scenes = [scene for _ in range(groups) for scene in scenes_in_fours(rng, vocabulary)]
    pictures = np.stack([render(vocabulary, scene, PIXELS) for scene in scenes])
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({"pictures": torch.from_numpy(pictures), "scenes": scenes}, partial)
    partial.rename(path)


def draw_all_pictures(
    vocabulary: tuple[Thing, ...], count: int, work: Path, groups: int = 1000
) -> None:
    """Draws those of the first `count` chunks that are missing, one per processor core."""
    missing = [index for index in range(count) if not picture_path(work, index).exists()]
    in_processes(draw_pictures, [(vocabulary, index, work, groups) for index in missing])


def load_pictures(work: Path, count: int) -> PictureChunk:
    """Reads the first `count` chunks as one."""
    files = [torch.load(picture_path(work, i), weights_only=False) for i in range(count)]
    return PictureChunk(
        torch.cat([file["pictures"] for file in files]),
        [scene for file in files for scene in file["scenes"]],
    )


def as_input(pictures: Tensor) -> Tensor:
    """Turns (B, 64, 64, 3) bytes into (B, 3, 64, 64) floats in [-1, 1]."""
    return to_tensor(pictures.numpy())
