"""Measures whether the embedded image model draws what it is asked for.

Run on its own, it evaluates a finished folder: accuracy over the vocabulary and a contact sheet.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from diffaccel.quality.contact_sheet import grid
from embedded.arguments import add_vocabulary, evaluating
from embedded.scenes import BACKGROUNDS, Background, Placed, Scene, plain_caption, render
from embedded.vocabulary import Thing, load_vocabulary

FEATURE_SIZE = 24
CONTACT_PROMPTS = (
    "a red apple on a white background",
    "a rocket on a blue background",
    "a red apple and a rocket on a blue background",
    "a cat on a yellow background",
    "a bicycle on a green background",
    "an anchor on an orange background",
    "a cactus on a pink background",
    "a penguin on a teal background",
    "a burger on a white background",
    "a guitar on a purple background",
    "a sailboat on a white to blue gradient background",
    "a sunflower on a black background",
    "a heart and a star on a white background",
    "an elephant on a gray background",
    "a dog and a football on a green background",
    "a pizza and a glass of wine on a red background",
    "a house and a tree on a yellow background",
    "a strawberry, a banana and a lemon on a white background",
    "a car, a bus and a tractor on a gray background",
    "an owl on a purple to black gradient background",
    "a hammer and a key on a brown background",
    "an umbrella",
    "an image of a butterfly on a pink background",
    "close-up of a watermelon on a teal background",
)


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of the pipeline with which the model is used and measured.

    Attributes:
        num_inference_steps: Steps of the sampler.
        true_cfg_scale: Strength of guidance towards the prompt.
        max_sequence_length: Words to which prompts are padded.
        size: Side of the picture in pixels.
    """

    num_inference_steps: int = 20
    true_cfg_scale: float = 3.0
    max_sequence_length: int = 32
    size: int = 256


def generate(
    pipe: FluxPipeline, prompts: Sequence[str], seeds: Sequence[int], call: Call, batch: int = 8
) -> list[Image.Image]:
    """Generates one picture per prompt."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        pictures += pipe(
            part,
            negative_prompt=[""] * len(part),
            true_cfg_scale=call.true_cfg_scale,
            num_inference_steps=call.num_inference_steps,
            max_sequence_length=call.max_sequence_length,
            height=call.size,
            width=call.size,
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
        ).images
    return pictures


def object_features(picture: np.ndarray) -> np.ndarray:
    """Describes what stands in front of the background, wherever and however large it is.

    The background is the median colour of the border; the bounding box of what differs from it
    is scaled to 24 x 24 px. Features are its colours, mask and brightness gradients, each with
    norm 1.

    Args:
        picture: (H, W, 3) uint8.

    Returns:
        A vector of norm 1.
    """
    pixels = picture.astype(np.float32) / 255
    ground = border_colour(pixels)
    mask = np.abs(pixels - ground).max(axis=-1) > 0.12
    rows, columns = np.flatnonzero(mask.sum(1) > 2), np.flatnonzero(mask.sum(0) > 2)
    if len(rows) < 4 or len(columns) < 4:
        return np.zeros(FEATURE_SIZE**2 * 6, np.float32)
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    side = max(box[2] - box[0], box[3] - box[1])
    square = np.zeros((side, side, 4), np.float32)
    square[..., :3] = ground
    top, left = (side - (box[3] - box[1])) // 2, (side - (box[2] - box[0])) // 2
    cut = (slice(box[1], box[3]), slice(box[0], box[2]))
    inside = (slice(top, top + box[3] - box[1]), slice(left, left + box[2] - box[0]))
    square[inside][..., :3] = pixels[cut]
    square[inside][..., 3] = mask[cut]
    small = np.stack(
        [
            np.asarray(
                Image.fromarray(square[..., c]).resize((FEATURE_SIZE,) * 2, Image.Resampling.BOX)
            )
            for c in range(4)
        ],
        axis=-1,
    )
    colours = (small[..., :3] - ground) * small[..., 3:]
    gradients = np.stack(np.gradient(small[..., :3].mean(-1)), axis=-1)
    parts = (colours, small[..., 3] - small[..., 3].mean(), gradients)
    vector = np.concatenate([p.ravel() / (np.linalg.norm(p) + 1e-6) for p in parts])
    return vector / 3**0.5


def background_of(picture: np.ndarray) -> str:
    """Names the plain background that is nearest to the median colour of the border."""
    ground = border_colour(picture.astype(np.float32))
    return min(BACKGROUNDS, key=lambda name: np.abs(np.array(BACKGROUNDS[name]) - ground).sum())


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """The median colour of the border of (H, W, 3) pixels."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def reference_features(vocabulary: tuple[Thing, ...], background: str) -> np.ndarray:
    """Features (things, F) of every object, drawn large on a plain background."""
    ground = Background((background,), (BACKGROUNDS[background],), 0)
    return np.stack(
        [
            object_features(render(vocabulary, Scene((Placed(i, 0.1, 0.1, 0.8),), ground), 192))
            for i in range(len(vocabulary))
        ]
    )


def ranks(
    vocabulary: tuple[Thing, ...],
    pictures: list[Image.Image],
    things: list[int],
    backgrounds: list[str],
) -> list[int]:
    """Ranks the right object among all of the vocabulary by similarity, 0 is nearest."""
    references = {name: reference_features(vocabulary, name) for name in sorted(set(backgrounds))}
    found = []
    for picture, thing, background in zip(pictures, things, backgrounds, strict=True):
        scores = references[background] @ object_features(np.asarray(picture))
        found.append(int((scores > scores[thing]).sum()))
    return found


def single_object_test(
    vocabulary: tuple[Thing, ...], count: int = 100
) -> tuple[list[int], list[str], list[str]]:
    """Chooses objects, backgrounds and prompts of the accuracy test, always the same."""
    rng = random.Random(5)
    things = rng.sample(range(len(vocabulary)), min(count, len(vocabulary)))
    backgrounds = [rng.choice(list(BACKGROUNDS)) for _ in things]
    prompts = [
        plain_caption(vocabulary, (thing,), background)
        for thing, background in zip(things, backgrounds, strict=True)
    ]
    return things, backgrounds, prompts


def evaluate(
    pipe: DiffusionPipeline,
    vocabulary: tuple[Thing, ...],
    out: Path,
    call: Any,
    count: int = 100,
    draw: Callable[..., list[Image.Image]] = generate,
) -> dict[str, float]:
    """Runs the accuracy test, writes its figures and contact sheets.

    Args:
        pipe: The pipeline.
        vocabulary: What it should be able to draw.
        out: Folder for `evaluation.json`, `contact.png` and `objects.png`.
        call: How to call the pipeline.
        count: Number of single-object prompts.
        draw: Generates pictures from pipeline, prompts, seeds and call, as `generate` does.

    Returns:
        Shares of prompts whose object is nearest, among the five nearest, and whose background
        is the right one.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    sheet = draw(pipe, list(CONTACT_PROMPTS), list(range(len(CONTACT_PROMPTS))), call)
    grid(sheet, 6).save(out / "contact.png")
    things, backgrounds, prompts = single_object_test(vocabulary, count)
    pictures = draw(pipe, prompts, list(range(len(prompts))), call)
    grid(pictures, 10).save(out / "objects.png")
    found = ranks(vocabulary, pictures, things, backgrounds)
    figures = {
        "prompts": len(found),
        "top_1": sum(rank < 1 for rank in found) / len(found),
        "top_5": sum(rank < 5 for rank in found) / len(found),
        "background": sum(
            background_of(np.asarray(picture)) == asked
            for picture, asked in zip(pictures, backgrounds, strict=True)
        )
        / len(found),
    }
    missed = {p: rank for p, rank in zip(prompts, found, strict=True) if rank >= 5}
    report = {**figures, "call": repr(call), "missed": missed}
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return figures


def main() -> None:
    """Evaluates a pipeline folder."""
    parser = evaluating(__doc__, "evaluation")
    add_vocabulary(parser)
    usual = Call()
    parser.add_argument("--steps", type=int, default=usual.num_inference_steps)
    parser.add_argument("--cfg", type=float, default=usual.true_cfg_scale)
    parser.add_argument("--length", type=int, default=usual.max_sequence_length)
    parser.add_argument("--size", type=int, default=usual.size)
    args = parser.parse_args()
    vocabulary = load_vocabulary(args.packages, args.vocabulary)
    pipe = FluxPipeline.from_pretrained(args.model)
    call = Call(args.steps, args.cfg, args.length, args.size)
    print(evaluate(pipe, vocabulary, args.out, call, args.count))
