"""Turns `--recipe NAME` and its switches into a refinement and a method for images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from diffaccel.cli.options.argument_types import at_least, share
from diffaccel.cli.options.method_options import check_knob_names, parse_method
from diffaccel.cli.video import RECIPES
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.methods import Method
    from diffaccel.pipelines.image.presets import Preset
    from diffaccel.pipelines.image.recipe import Refinement

IMAGE_RECIPES = ("direct", "window", "guided", "cascade")
ROPES = ("plain", "ntk", "yarn")
SWITCHES = ("max_upscale", "guidance", "shift", "rope", "proportional", "jitter")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--recipe` and the switches to a parser."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="how to get beyond what the model knows. Images: direct (at full size at once), "
        "window (one jump, windows alone), guided (the same under the low frequencies of the "
        "native sample), cascade (guided, in stages of at most 2x; default). Videos: freeswim "
        "for size (default), windows for length",
    )
    parser.add_argument(
        "--refine-steps", type=at_least(1), metavar="N", help="steps of each larger stage"
    )
    parser.add_argument(
        "--strength",
        type=share,
        metavar="S",
        help="share of the noise schedule that larger stages redo, in (0, 1]",
    )
    parser.add_argument(
        "--max-upscale",
        type=_factor,
        metavar="F",
        help="images: largest factor per stage and side, above 1; 2 makes 1x, 2x, 4x",
    )
    parser.add_argument(
        "--guidance",
        type=_weight,
        metavar="W",
        help="images: share of the low frequencies that the smaller picture decides, 0 to 1",
    )
    parser.add_argument(
        "--shift",
        type=_shift,
        metavar="F",
        help="images: of the noise schedule, a number or size (FLUX, SD3, Qwen-Image)",
    )
    parser.add_argument(
        "--rope", choices=ROPES, help="images: how rotary positions are scaled (FLUX)"
    )
    parser.add_argument(
        "--proportional",
        action="store_true",
        default=None,
        help="images: sharpen the softmax for the number of tokens",
    )
    parser.add_argument(
        "--jitter",
        action="store_true",
        default=None,
        help="images: move the borders of windows at every step",
    )


def check_recipe(arguments: argparse.Namespace) -> None:
    """Refuses a recipe or a switch that is not for what is made, before anything is loaded.

    Raises:
        InputError: It is for images and a video is made, or the other way round.
    """
    kind, names = ("a video", RECIPES) if arguments.frames else ("an image", IMAGE_RECIPES)
    if arguments.recipe not in (None, *names):
        raise InputError(
            f"--recipe of {kind} must be one of {', '.join(names)}, got {arguments.recipe!r}; "
            "choose one"
        )
    given = [name for name in SWITCHES if getattr(arguments, name) is not None]
    if arguments.frames and given:
        raise InputError(
            f"--{given[0].replace('_', '-')} is for images, got it with --frames; leave it out"
        )
    if arguments.frames:
        return
    if arguments.method:
        parse_method(arguments.method, arguments.knobs)
    else:
        check_knob_names(arguments.knobs)


def chosen_recipe(arguments: argparse.Namespace, preset: Preset) -> tuple[Refinement, Method]:
    """Returns the recipe of a preset with the user's switches and method.

    Raises:
        InputError: A knob or a switch is out of range.
    """
    recipe = preset.recipes[arguments.recipe or preset.recipe]
    method = parse_method(arguments.method or recipe.method, arguments.knobs, recipe.knobs)
    changes = {name: getattr(arguments, name) for name in (*SWITCHES, "strength")}
    changes["steps"] = arguments.refine_steps
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return replace(recipe.refinement, **given), method
    except ValueError as error:
        raise InputError(str(error)) from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _weight(text: str) -> float:
    number = _number(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in 0 to 1, got {text}")
    return number


def _factor(text: str) -> float:
    number = _number(text)
    if not 1.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 1, got {text}")
    return number


def _shift(text: str) -> float | str:
    if text == "size":
        return text
    number = _number(text)
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0 or size, got {text}")
    return number
