"""Compares kinds of guidance on an embedded model, with heads found by a search.

Heads are searched for the embedded scorer's prompt match or another measure. Every picture is
also compared with the drawing that its prompt names; prompts of the search and of the comparison
are different ones:

    python samples/embedded compare guidance --model unet --packages build/embedded/packages
"""

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter

import numpy as np
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from diffaccel import HeadPerturbation, SkipLayers, set_guidance
from diffaccel.guidance.head_search.search import SearchSettings, SearchState, search_heads
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE, EMBEDDED_SCORER, EMBEDDED_UNET
from diffaccel.pipelines.loading import load_image_pipeline
from diffaccel.quality.contact_sheet import grid
from diffaccel.quality.objectives import Objective, PromptMatch, saturation, sharpness
from embedded.image.evaluate import Call, generate, object_features, reference_features
from embedded.scenes import BACKGROUNDS, plain_caption
from embedded.unet.evaluate import UNetCall, generate_with_unet
from embedded.vocabulary import Thing, load_vocabulary

Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]

SMALL = 112  # side of the pictures of the overview
MEASURES = ("prompt match", "likeness", "right object", "sharpness", "saturation")


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


def load(model: str, steps: int) -> tuple[DiffusionPipeline, Draw, Draw]:
    """Loads a model; returns it and how it draws without and with classifier-free guidance."""
    if model == "image":
        pipe = load_image_pipeline(EMBEDDED_IMAGE, device="cpu")
        calls = Call(num_inference_steps=steps, true_cfg_scale=1.0), Call(steps)
        plain, guided = (partial(generate, pipe, call=call) for call in calls)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED_UNET, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        calls = UNetCall(steps, guidance_scale=1.0), UNetCall(steps)
        plain, guided = (partial(generate_with_unet, pipe, call=call) for call in calls)
    return pipe, plain, guided


def find_heads(
    pipe: DiffusionPipeline, asked: Asked, name: str, objective: Objective, draw: Draw,
    file: Path, per_round: int, scale: float,
) -> SearchState:  # fmt: skip
    """Searches heads for an objective, without classifier-free guidance, or takes up a search."""
    settings = SearchSettings(
        objective=name,
        prompts=asked.prompts,
        seeds=asked.seeds,
        per_round=per_round,
        scale=scale,
    )
    return search_heads(
        pipe, draw, objective, settings, file=file, advance=lambda: print(".", end="", flush=True)
    )


def measure(
    pipe: DiffusionPipeline,
    asked: Asked,
    measures: dict[str, Objective],
    draw: Draw,
    guidance: object,
    scale: float,
) -> tuple[dict[str, list[float]], list[Image.Image]]:
    """Draws all prompts with a guidance, and measures the pictures."""
    started = perf_counter()
    with set_guidance(pipe, guidance, scale=scale) if guidance else nullcontext():
        pictures = draw(list(asked.prompts), list(asked.seeds))
    seconds = (perf_counter() - started) / len(pictures)
    values = {name: score(pictures, asked.prompts) for name, score in measures.items()}
    return values | {"seconds a picture": [seconds]}, pictures


def with_spread(values: Sequence[float]) -> str:
    """Mean and, of several values, its standard error."""
    spread = "" if len(values) < 2 else f" ± {stdev(values) / len(values) ** 0.5:.3f}"
    return f"{fmean(values):.3f}{spread}"


def main() -> None:
    """Searches heads, then prints a table and writes contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("image", "unet"), default="unet")
    parser.add_argument("--packages", type=Path, default=Path("build/embedded/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/embedded/guidance"))
    parser.add_argument("--searched", type=int, default=12, help="prompts of the search")
    parser.add_argument("--samples", type=int, default=64, help="prompts of the comparison")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--per-round", type=int, default=3)
    parser.add_argument("--scale", type=float, default=2.0, help="of every perturbation")
    parser.add_argument("--objective", choices=MEASURES, default=MEASURES[0])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    vocabulary = load_vocabulary(args.packages)
    searched, asked = draw_questions(vocabulary, (args.searched, args.samples))
    likeness = Likeness(vocabulary, (searched, asked))
    scores = (PromptMatch(EMBEDDED_SCORER), likeness, likeness.right, sharpness, saturation)
    measures = dict(zip(MEASURES, scores, strict=True))
    pipe, plain, guided = load(args.model, args.steps)
    state = find_heads(
        pipe, searched, args.objective, measures[args.objective], plain,
        args.out / "heads.json", args.per_round, args.scale,
    )  # fmt: skip
    half = HeadPerturbation(heads=tuple(state.chosen), strength=0.5)
    chosen = ", ".join(f"{layer}.{head}" for layer, head in state.chosen)
    best = max(score for scores in state.rounds for score in scores.values())
    print(f"\nheads {chosen}; in the search {state.unguided:.3f} without, {best:.3f} at best")
    middle = len({layer for layer, _ in state.rounds[0]}) // 2
    kinds = {
        "none": (plain, None),
        "CFG 3": (guided, None),
        f"heads {chosen}": (plain, state.perturbation()),
        "the same at strength 0.5": (plain, half),
        f"PAG, layer {middle}": (plain, HeadPerturbation(layers=(middle,))),
        f"SLG, layer {middle}": (plain, SkipLayers((middle,))),
        "CFG 3 and heads": (guided, state.perturbation()),
        "CFG 3 and heads at 0.5": (guided, half),
    }
    columns = ("guidance", *measures, f"change of {args.objective}", "seconds a picture")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    unguided: list[float] = []
    rows: dict[str, list[Image.Image]] = {}
    for name, (draw, guidance) in kinds.items():
        values, pictures = measure(pipe, asked, measures, draw, guidance, args.scale)
        seconds = values.pop("seconds a picture")
        unguided = unguided or values[args.objective]
        # the same prompts and noise: differences spread less than the scores
        pairs = zip(values[args.objective], unguided, strict=True)
        changes = [after - before for after, before in pairs]
        cells = map(with_spread, (*values.values(), changes, seconds))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        rows[name] = [picture.resize((SMALL, SMALL)) for picture in pictures[:8]]
        grid(pictures[:24], 8).save(args.out / f"{len(rows)}.png")
    shown = [picture for row in rows.values() for picture in row]
    labels = [text for name, row in rows.items() for text in [name, *[""] * (len(row) - 1)]]
    grid(shown, 8, labels).save(args.out / "overview.png")
