"""Turns `--recipe NAME` and its switches into a refinement and a method for images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Group, Parameter, Token
from docstring_parser import parse_from_object

from diffaccel.cli.options.method_options import check_knob_names, parse_method
from diffaccel.errors import InputError
from diffaccel.pipelines.image.recipe import IMAGE_RECIPES, Refinement
from diffaccel.pipelines.video.recipes import VIDEO_RECIPES

if TYPE_CHECKING:
    from diffaccel.cli.options.sample_options import SampleOptions
    from diffaccel.pipelines.image.job import ImageJob
    from diffaccel.pipelines.image.presets import Preset

BEYOND = Group("Beyond what the model knows", sort_key=3)


def _read_number_or_text(_target: object, tokens: Sequence[Token]) -> float | str:
    try:
        return float(tokens[0].value)
    except ValueError:
        return tokens[0].value


AS_OPTIONS: dict[str, Parameter] = {
    "steps": Parameter(name="--refine-steps", metavar="N"),
    "strength": Parameter(metavar="S"),
    "max_upscale": Parameter(metavar="F"),
    "guidance": Parameter(metavar="W"),
    "shift": Parameter(metavar="F|size", converter=_read_number_or_text, show_choices=False),
    "rope": Parameter(metavar="NAME"),
    "proportional": Parameter(),
    "jitter": Parameter(),
}
"""The fields of `Refinement` that are options; types and help come from there."""
OF_VIDEOS = ("steps", "strength")


def option_of(name: str) -> str:
    """Returns the option that sets a field of `Refinement`."""
    return [*(AS_OPTIONS[name].name or ()), f"--{name.replace('_', '-')}"][0]


def _switches() -> type:
    """Makes a dataclass of `AS_OPTIONS`: each as in `Refinement`, None where it is not given."""
    types = get_type_hints(Refinement)
    described = {
        field.arg_name: field.description or "" for field in parse_from_object(Refinement).params
    }
    return make_dataclass(
        "Switches",
        [
            (
                name,
                Annotated[
                    types[name] | None,
                    Parameter(group=BEYOND, help=_first_sentence(described[name], name)),
                    parameter,
                ],
                None,
            )
            for name, parameter in AS_OPTIONS.items()
        ],
        namespace={"__module__": __name__},
        frozen=True,
        kw_only=True,
    )


def _first_sentence(text: str, name: str) -> str:
    sentence = " ".join(text.split()).partition(". ")[0].removeprefix("Whether ").rstrip(".") + "."
    return sentence if name in OF_VIDEOS else f"Images: {sentence[0].lower()}{sentence[1:]}"


if TYPE_CHECKING:
    Switches = Any
else:
    Switches = _switches()


def given_switches(switches: Switches) -> dict[str, Any]:
    """Returns the fields of `Refinement` that the user has set.

    Raises:
        InputError: A value breaks a rule of `Refinement`.
    """
    given = {field.name: getattr(switches, field.name) for field in fields(switches)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        try:
            replace(Refinement(steps=1, strength=1.0), **{name: value})
        except ValueError as error:
            raise InputError(f"{option_of(name)}: {error}") from error
    return given


def check_recipe(options: SampleOptions) -> None:
    """Refuses a recipe or a switch that is not for what is made, before anything is loaded.

    Raises:
        InputError: It is for images and a video is made, or the other way round.
    """
    kind, names = ("a video", VIDEO_RECIPES) if options.frames else ("an image", IMAGE_RECIPES)
    if options.recipe not in (None, *names):
        raise InputError(
            f"--recipe of {kind} must be one of {', '.join(names)}, got {options.recipe!r}; "
            "choose one"
        )
    given = given_switches(options.switches)
    for name in given:
        if options.frames and name not in OF_VIDEOS:
            raise InputError(
                f"{option_of(name)} is for images, got it with --frames; leave it out"
            )
    if options.frames:
        return
    if options.method:
        parse_method(options.method, options.knobs)
    else:
        check_knob_names(options.knobs)


def image_job(prompt: str | None, options: SampleOptions, preset: Preset) -> ImageJob:
    """Returns what is asked for, with the recipe of a preset and the user's switches and method.

    Raises:
        InputError: The size, a knob or a switch is out of range.
    """
    from diffaccel.pipelines.image.job import ImageJob

    recipe = preset.recipes[options.recipe or preset.recipe]
    return ImageJob(
        prompt,
        options.size or (preset.native, preset.native),
        preset,
        parse_method(options.method or recipe.method, options.knobs, recipe.knobs),
        replace(recipe.refinement, **given_switches(options.switches)),
        options.steps,
        options.seed,
        always=options.always or options.method is not None,
    )
