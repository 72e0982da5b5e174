"""The options of `diffaccel heads`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter, Token

from diffaccel.cli.options.argument_types import COUNT, POSITIVE, SEED, SHARE

HOW = Parameter(group=Group("How it draws", sort_key=2))
MODEL = Parameter(metavar="ID_OR_FOLDER")


def _read_layers(_target: object, tokens: Sequence[Token]) -> tuple[int, ...]:
    text = tokens[0].value
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"must be integers such as 0,1,4, got {text!r}") from None


LAYERS = Parameter(converter=_read_layers, metavar="I,J,…", n_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingOptions:
    """How pictures are drawn.

    Attributes:
        model: Default: the small transformer in the package; embedded-unet is its small U-Net.
        scale: Of the guidance (default: 3).
        steps: Denoising steps (default: those of the model).
        seed: Of the noise (default: 0).
        device: Default: the best one.
    """

    model: Annotated[str | None, HOW, MODEL] = None
    scale: Annotated[float, HOW, POSITIVE, Parameter(metavar="W")] = 3.0
    steps: Annotated[int | None, HOW, COUNT] = None
    seed: Annotated[int, HOW, SEED] = 0
    device: Annotated[str | None, HOW, Parameter(metavar="NAME")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What is searched.

    Attributes:
        objective: What is maximised: sharpness, saturation, brightness, darkness, colourfulness,
            similarity (with --reference), prompt-match (with --scorer).
        reference: Picture to come near to.
        scorer: CLIP model or PickScore (default: the small one in the package).
        held_out: A prompt on which the result is tested, repeatable.
        per_round: Heads that each round adds (default: 3).
        rounds: Rounds (default: 1).
        layers: Layers that are tried (default: all).
        strength: Of the damage, in (0, 1] (default: 1).
    """

    objective: Annotated[str, Parameter(metavar="NAME")]
    reference: Annotated[str | None, Parameter(metavar="FILE")] = None
    scorer: Annotated[str | None, MODEL] = None
    held_out: Annotated[tuple[str, ...], Parameter(metavar="PROMPT")] = ()
    per_round: Annotated[int, COUNT, Parameter(metavar="K")] = 3
    rounds: Annotated[int, COUNT, Parameter(metavar="R")] = 1
    layers: Annotated[tuple[int, ...], LAYERS] = ()
    strength: Annotated[float, SHARE] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetOptions:
    """A sheet of pictures.

    Attributes:
        sheet: Draw this prompt with every head.
        layers: Layers of the sheet (default: all).
        strength: Of the damage, in (0, 1] (default: 1).
    """

    sheet: Annotated[str | None, Parameter(metavar="PROMPT")] = None
    layers: Annotated[tuple[int, ...], LAYERS] = ()
    strength: Annotated[float, SHARE] = 1.0
