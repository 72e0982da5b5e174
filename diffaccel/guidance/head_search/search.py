"""Searches the attention heads whose damage guides a model towards an objective.

Greedy: every head that is left is tried together with those chosen so far, the best few are kept,
and again. Source: "Fine-Grained Perturbation Guidance via Attention Head Selection" (HeadHunter,
Ahn et al., 2025, https://arxiv.org/abs/2506.10978).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from PIL import Image

from diffaccel.attach.attachment import denoisers
from diffaccel.bindings import binding_of
from diffaccel.errors import InputError, check_kinds
from diffaccel.guidance.attachment import set_guidance
from diffaccel.guidance.perturb.heads import HeadPerturbation
from diffaccel.quality.objectives import Objective

Head = tuple[int, int]
Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How heads are searched.

    Attributes:
        objective: Name of what is maximised; part of what makes two searches the same.
        prompts: What is drawn for each candidate.
        seeds: Of the noise, one per prompt.
        per_round: Heads that each round adds.
        rounds: Rounds. Quality is decided in the first; styles appear from the second on.
        strength: Of the perturbation while searching; 1 shows effects most clearly.
        scale: Of the guidance.
        layers: Layers whose heads are tried; empty for all.
    """

    objective: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    per_round: int = 3
    rounds: int = 1
    strength: float = 1.0
    scale: float = 3.0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.prompts or len(self.prompts) != len(self.seeds):
            raise InputError(
                f"a search needs at least one prompt and a seed for each, got "
                f"{len(self.prompts)} prompts and {len(self.seeds)} seeds"
            )
        if self.per_round < 1 or self.rounds < 1:
            raise InputError(
                f"per_round and rounds must be at least 1, got per_round={self.per_round}, "
                f"rounds={self.rounds}"
            )
        HeadPerturbation(layers=self.layers, strength=self.strength)


@dataclass
class SearchState:
    """What a search has found so far; a JSON file that can be taken up again.

    Attributes:
        settings: How it searches.
        unguided: Mean objective without guidance.
        rounds: For each round, the mean objective with each candidate added.
        chosen: Heads in the order in which they were chosen.
    """

    settings: SearchSettings
    unguided: float | None = None
    rounds: list[dict[Head, float]] = field(default_factory=list)
    chosen: list[Head] = field(default_factory=list)

    def perturbation(self) -> HeadPerturbation:
        """The guidance that was found."""
        return HeadPerturbation(heads=tuple(self.chosen), strength=self.settings.strength)

    def save(self, path: Path) -> None:
        """Writes a file that `HeadPerturbation.load` reads as well."""
        from diffaccel.files import replacing

        content: dict[str, Any] = {
            "perturbation": {"heads": self.chosen, "strength": self.settings.strength},
            "scale": self.settings.scale,
            "settings": asdict(self.settings),
            "unguided": self.unguided,
            "rounds": [
                {f"{layer}.{head}": score for (layer, head), score in scores.items()}
                for scores in self.rounds
            ],
            "chosen": self.chosen,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> SearchState:
        """Reads what `save` wrote; raises InputError for anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            settings: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in content["settings"].items()
            }
            return cls(
                SearchSettings(**settings),
                content["unguided"],
                [
                    {_head(name): score for name, score in scores.items()}
                    for scores in content["rounds"]
                ],
                [tuple(head) for head in content["chosen"]],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"a head file must be JSON that a search wrote, {str(path)!r} is not ({error})"
            ) from error


def search_heads(
    pipe: DiffusionPipeline,
    draw: Draw,
    objective: Objective,
    settings: SearchSettings,
    *,
    file: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> SearchState:
    """Searches heads, or goes on with the search in a file.

    Args:
        pipe: The pipeline that `draw` uses.
        draw: Makes pictures for prompts and seeds, with whatever guidance the pipeline has.
        objective: What is maximised, see `diffaccel.quality.objectives`.
        settings: How.
        file: Where the state is kept after each candidate; taken up if it exists.
        advance: Called for each picture set that is drawn.

    Returns:
        The finished state.

    Raises:
        InputError: The file holds another search, the objective returns no finite numbers, or
            more heads are asked for than there are. What was found is in the file.
    """
    state = SearchState(settings)
    if file is not None and file.exists():
        state = SearchState.load(file)
        if state.settings != settings:
            raise InputError(
                f"{str(file)!r} holds a search with other settings; choose another file, or "
                "delete it to start over"
            )
    heads = all_heads(pipe, settings.layers)
    wanted = settings.per_round * settings.rounds
    if wanted > len(heads):
        raise InputError(
            f"a search can choose {len(heads)} heads here, got per_round * rounds = {wanted}; "
            "ask for fewer or allow more layers"
        )

    def keep() -> None:
        advance()
        if file is not None:
            state.save(file)

    if state.unguided is None:
        state.unguided = mean_score(draw, objective, settings)
        keep()
    while len(state.chosen) < wanted:
        if len(state.rounds) * settings.per_round == len(state.chosen):
            state.rounds.append({})
        scores = state.rounds[-1]
        for head in heads:
            if head in state.chosen or head in scores:
                continue
            trial = HeadPerturbation(heads=(*state.chosen, head), strength=settings.strength)
            with set_guidance(pipe, trial, scale=settings.scale):
                scores[head] = mean_score(draw, objective, settings)
            keep()
        best = sorted(scores, key=lambda head: (-scores[head], head))
        state.chosen += best[: settings.per_round]
    if file is not None:
        state.save(file)
    return state


def all_heads(pipe: DiffusionPipeline, layers: tuple[int, ...] = ()) -> list[Head]:
    """Lists the heads (layer, head) of a pipeline's first denoiser.

    Raises:
        InputError: The model has no such layer.
    """
    model = next(iter(denoisers(pipe).values()))
    found = binding_of(model).layers(model)
    unknown = [index for index in layers if index >= len(found)]
    if unknown:
        raise InputError(
            f"layers must lie in 0 to {len(found) - 1} for {type(model).__name__}, got "
            f"{', '.join(map(str, unknown))}"
        )
    return [
        (layer.index, head)
        for layer in found
        if not layers or layer.index in layers
        for head in range(cast(Any, model.get_submodule(layer.name)).heads)
    ]


def _head(name: str) -> Head:
    layer, head = map(int, name.split("."))
    return layer, head


def mean_score(draw: Draw, objective: Objective, settings: SearchSettings) -> float:
    """Mean objective over the prompts, with whatever guidance is set.

    Raises:
        InputError: The objective returns something else than a finite number each.
    """
    scores = list(objective(draw(settings.prompts, settings.seeds), settings.prompts))
    if len(scores) != len(settings.prompts) or not all(map(math.isfinite, scores)):
        raise InputError(
            f"an objective must return a finite number for each of {len(settings.prompts)} "
            f"pictures, {settings.objective} returned {scores}; what was found so far is kept"
        )
    return float(sum(scores) / len(scores))


def held_out_scores(
    pipe: DiffusionPipeline,
    draw: Draw,
    objective: Objective,
    state: SearchState,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
) -> tuple[list[float], list[float]]:
    """Scores of prompts that the search has not seen, without and with what it found."""
    settings = replace(state.settings, prompts=prompts, seeds=seeds)
    plain = list(objective(draw(prompts, seeds), prompts))
    with set_guidance(pipe, state.perturbation(), scale=settings.scale):
        guided = list(objective(draw(prompts, seeds), prompts))
    return plain, guided
