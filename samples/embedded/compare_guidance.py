"""Compares kinds of guidance on the embedded image model, with heads found by a search.

Every picture is compared with the drawing that its prompt names; prompts of the search and of the
comparison are different ones:

    python samples/embedded/compare_guidance.py --packages build/embedded/packages
"""

import argparse
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter

import numpy as np
from evaluate import Call, contact_sheet, generate, object_features, reference_features
from PIL import Image
from scenes import BACKGROUNDS, plain_caption
from vocabulary import Thing, load_vocabulary

from diffaccel import HeadPerturbation, SkipLayers, set_guidance
from diffaccel.guidance.head_search import SearchSettings, SearchState, search_heads
from diffaccel.guidance.objectives import saturation, sharpness
from diffaccel.pipelines.loading import EMBEDDED_IMAGE, load_image_pipeline

MEASURES = ("likeness", "right object", "sharpness", "saturation", "seconds a picture")


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts about one object each, and what they name.

    Attributes:
        prompts: The prompts.
        things: Index of the object of each.
        backgrounds: Name of the background of each.
        seeds: Of the noise.
    """

    prompts: tuple[str, ...]
    things: tuple[int, ...]
    backgrounds: tuple[str, ...]
    seeds: tuple[int, ...]


def draw_questions(
    vocabulary: tuple[Thing, ...], counts: Sequence[int], seed: int = 17
) -> list[Asked]:
    """Draws sets of prompts that share no object.

    Args:
        vocabulary: What can be asked for.
        counts: Number of prompts of each set; together at most as many as there are objects.
        seed: Of the choice.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(vocabulary)), sum(counts))
    sets = []
    for count in counts:
        things, order = tuple(order[:count]), order[count:]
        backgrounds = tuple(rng.choice(list(BACKGROUNDS)) for _ in things)
        prompts = tuple(
            plain_caption(vocabulary, (thing,), background)
            for thing, background in zip(things, backgrounds, strict=True)
        )
        sets.append(Asked(prompts, things, backgrounds, tuple(range(count))))
    return sets


class Likeness:
    """How like the drawing that was asked for a picture is: cosine of `object_features`.

    Args:
        vocabulary: The drawings.
        questions: All prompts that will be scored.
    """

    def __init__(self, vocabulary: tuple[Thing, ...], questions: Sequence[Asked]) -> None:
        backgrounds = sorted({name for asked in questions for name in asked.backgrounds})
        self._drawings = {name: reference_features(vocabulary, name) for name in backgrounds}
        self._named = {
            prompt: (thing, background)
            for asked in questions
            for prompt, thing, background in zip(
                asked.prompts, asked.things, asked.backgrounds, strict=True
            )
        }

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Likeness to the drawing of each prompt, -1 to 1."""
        return [float(scores[thing]) for scores, thing in self._scores(pictures, prompts)]

    def right(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """1 where no other drawing is nearer, else 0."""
        return [
            float((scores > scores[thing]).sum() == 0)
            for scores, thing in self._scores(pictures, prompts)
        ]

    def _scores(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[tuple[np.ndarray, int]]:
        found = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            thing, background = self._named[prompt]
            features = object_features(np.asarray(picture))
            found.append((self._drawings[background] @ features, thing))
        return found


def find_heads(
    pipe: object, asked: Asked, likeness: Likeness, call: Call, file: Path, per_round: int
) -> SearchState:
    """Searches heads for likeness, without classifier-free guidance, or takes up a search."""
    settings = SearchSettings(
        objective="likeness",
        prompts=asked.prompts,
        seeds=asked.seeds,
        per_round=per_round,
        scale=2.0,
    )

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return generate(pipe, list(prompts), list(seeds), call)

    return search_heads(
        pipe, draw, likeness, settings, file=file, advance=lambda: print(".", end="", flush=True)
    )


def measure(
    pipe: object, asked: Asked, likeness: Likeness, call: Call, guidance: object, scale: float
) -> tuple[dict[str, list[float]], list[Image.Image]]:
    """Draws all prompts with a guidance, and measures the pictures."""
    started = perf_counter()
    with set_guidance(pipe, guidance, scale=scale) if guidance else nullcontext():
        pictures = generate(pipe, list(asked.prompts), list(asked.seeds), call)
    seconds = (perf_counter() - started) / len(pictures)
    values = {
        "likeness": likeness(pictures, asked.prompts),
        "right object": likeness.right(pictures, asked.prompts),
        "sharpness": sharpness(pictures, asked.prompts),
        "saturation": saturation(pictures, asked.prompts),
        "seconds a picture": [seconds],
    }
    return values, pictures


def main() -> None:
    """Searches heads, then prints a table and writes contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path("build/embedded/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/embedded/guidance"))
    parser.add_argument("--searched", type=int, default=12, help="prompts of the search")
    parser.add_argument("--samples", type=int, default=64, help="prompts of the comparison")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--per-round", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    vocabulary = load_vocabulary(args.packages)
    questions = draw_questions(vocabulary, (args.searched, args.samples))
    likeness = Likeness(vocabulary, questions)
    pipe = load_image_pipeline(EMBEDDED_IMAGE, device="cpu")
    plain = Call(num_inference_steps=args.steps, true_cfg_scale=1.0)
    guided = Call(num_inference_steps=args.steps)
    state = find_heads(
        pipe, questions[0], likeness, plain, args.out / "heads.json", args.per_round
    )
    half = HeadPerturbation(heads=tuple(state.chosen), strength=0.5)
    chosen = ", ".join(f"{layer}.{head}" for layer, head in state.chosen)
    print(f"\nheads {chosen}; likeness {state.unguided:.3f} without guidance in the search")
    middle = len({layer for layer, _ in state.rounds[0]}) // 2
    kinds = {
        "none": (plain, None, 0.0),
        "CFG 3": (guided, None, 0.0),
        f"heads {chosen}": (plain, state.perturbation(), 2.0),
        "the same at strength 0.5": (plain, half, 2.0),
        f"PAG, layer {middle}": (plain, HeadPerturbation(layers=(middle,)), 2.0),
        f"SLG, layer {middle}": (plain, SkipLayers((middle,)), 2.0),
        "CFG 3 and heads": (guided, state.perturbation(), 2.0),
        "CFG 3 and heads at 0.5": (guided, half, 2.0),
    }
    print("| guidance | " + " | ".join(MEASURES) + " |")
    print("|---|" + "---|" * len(MEASURES))
    for number, (name, (call, guidance, scale)) in enumerate(kinds.items()):
        values, pictures = measure(pipe, questions[1], likeness, call, guidance, scale)
        contact_sheet(pictures[:24], 8).save(args.out / f"{number}.png")
        cells = []
        for measured in values.values():
            spread = stdev(measured) / len(measured) ** 0.5 if len(measured) > 1 else None
            cells.append(f"{fmean(measured):.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
