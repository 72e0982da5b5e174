"""Measures whether the embedded scorer tells pictures and prompts apart.

Run on its own, it evaluates a finished folder on pictures that training did not see.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffaccel.quality.objectives import PromptMatch
from embedded.arguments import add_vocabulary, evaluating
from embedded.image.evaluate import single_object_test
from embedded.scenes import BACKGROUNDS, Background, Scene, plain_caption, random_scene, render
from embedded.vocabulary import Thing, load_vocabulary

SEED = 7  # of the places of the held-out pictures; those of training are large


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out picture and what it shows.

    Attributes:
        picture: 256 x 256 px.
        things: Indices into the vocabulary, left to right.
        background: A key of `BACKGROUNDS`.
        prompt: Its usual caption.
    """

    picture: Image.Image
    things: tuple[int, ...]
    background: str
    prompt: str


def draw_example(
    rng: random.Random, vocabulary: tuple[Thing, ...], things: tuple[int, ...], background: str
) -> Example:
    """Draws things at random places on a plain background."""
    scene = _side_by_side(rng, vocabulary, len(things))
    placed = zip(scene.objects, things, strict=True)
    objects = tuple(replace(place, thing=thing) for place, thing in placed)
    ground = Background((background,), (BACKGROUNDS[background],), 0)
    picture = Image.fromarray(render(vocabulary, Scene(objects, ground), 256))
    return Example(picture, things, background, plain_caption(vocabulary, things, background))


def _side_by_side(rng: random.Random, vocabulary: tuple[Thing, ...], count: int) -> Scene:
    shares = tuple(float(count == objects) for objects in (1, 2, 3))
    return random_scene(rng, vocabulary, shares)


def recall(similarity: Tensor, among: int) -> float:
    """Share of rows (K, K) whose diagonal entry is among the `among` largest."""
    own = similarity.diagonal()[:, None]
    return ((similarity > own).sum(1) < among).float().mean().item()


def evaluate_scorer(
    scorer: PromptMatch, vocabulary: tuple[Thing, ...], out: Path, count: int = 100
) -> dict[str, float]:
    """Runs the tests and writes their figures to `scorer.json`.

    Args:
        scorer: The scorer.
        vocabulary: What it should know.
        out: Folder of the file.
        count: Number of single objects, and of pairs.

    Returns:
        Shares by the names of the tests, and "prompts".
    """
    rng = random.Random(SEED)
    things, backgrounds, _ = single_object_test(vocabulary, count)
    singles = [
        draw_example(rng, vocabulary, (thing,), background)
        for thing, background in zip(things, backgrounds, strict=True)
    ]
    images, texts = _embed(scorer, singles, [example.prompt for example in singles])
    similarity = images @ texts.T
    figures = {
        "prompts": len(singles),
        "text_to_image_1": recall(similarity.T, 1),
        "text_to_image_5": recall(similarity.T, 5),
        "image_to_text_1": recall(similarity, 1),
        "image_to_text_5": recall(similarity, 5),
        "order": _order(scorer, rng, vocabulary, count),
        "background": _background(scorer, vocabulary, singles, images),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "scorer.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _order(
    scorer: PromptMatch, rng: random.Random, vocabulary: tuple[Thing, ...], count: int
) -> float:
    """Share of pictures of two objects that prefer their caption to the swapped one."""
    pairs = [
        draw_example(
            rng,
            vocabulary,
            tuple(rng.sample(range(len(vocabulary)), 2)),
            rng.choice(list(BACKGROUNDS)),
        )
        for _ in range(count)
    ]
    swapped = [plain_caption(vocabulary, pair.things[::-1], pair.background) for pair in pairs]
    images, right = _embed(scorer, pairs, [pair.prompt for pair in pairs])
    _, wrong = _embed(scorer, pairs, swapped)
    return ((images * right).sum(1) > (images * wrong).sum(1)).float().mean().item()


def _background(
    scorer: PromptMatch, vocabulary: tuple[Thing, ...], singles: list[Example], images: Tensor
) -> float:
    """Share of pictures that prefer the right one of the twelve backgrounds."""
    best = None
    for place, background in enumerate(BACKGROUNDS):
        prompts = [plain_caption(vocabulary, single.things, background) for single in singles]
        _, texts = _embed(scorer, singles, prompts)
        score = (images * texts).sum(1)
        if best is None:
            best, chosen = score, torch.zeros(len(score), dtype=torch.long)
        chosen = torch.where(score > best, place, chosen)
        best = torch.maximum(score, best)
    names = list(BACKGROUNDS)
    right = [
        names[place] == single.background
        for place, single in zip(chosen.tolist(), singles, strict=True)
    ]
    return sum(right) / len(right)


def _embed(
    scorer: PromptMatch, examples: list[Example], prompts: list[str]
) -> tuple[Tensor, Tensor]:
    return scorer.embeddings([example.picture for example in examples], prompts)


def main() -> None:
    """Evaluates a scorer's folder."""
    parser = evaluating(__doc__, "scorer-evaluation")
    add_vocabulary(parser)
    args = parser.parse_args()
    vocabulary = load_vocabulary(args.packages, args.vocabulary)
    print(evaluate_scorer(PromptMatch(args.model), vocabulary, args.out, args.count))
