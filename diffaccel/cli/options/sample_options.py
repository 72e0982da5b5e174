"""The options that `sample` and `plan` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from diffaccel.cli.options.argument_types import COUNT, SEED, SIZE
from diffaccel.cli.options.recipe_options import BEYOND, Switches
from diffaccel.methods.names import METHODS
from diffaccel.pipelines.image.recipe import IMAGE_RECIPES
from diffaccel.pipelines.video.recipes import VIDEO_RECIPES

WHAT = Parameter(group=Group("What is made", sort_key=1))
ATTENTION = Parameter(group=Group("Attention above native size", sort_key=2))
OUTPUT = Parameter(group=Group("Output and device", sort_key=4))


def _listed(names: dict[str, str]) -> str:
    return "; ".join(f"{name} ({text})" for name, text in names.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What is sampled, how, and where it goes.

    Attributes:
        model: Diffusers folder or hub name; embedded-unet is the small U-Net in the package, whose
            small transformer is the default.
        size: Multiples of 16 (default: the native size).
        frames: Makes a video of so many frames, for most models 4 k + 1.
        fps: Frames per second of a video (default: 16).
        steps: Denoising steps at native size (default: those of the model).
        seed: Of the noise (default: 0).
        method: How to attend (default: what suits the model).
        knobs: A knob of the method, repeatable, such as `--set drop=0.9`; `diffaccel info` lists
            them all.
        always: Run the method even where dense attention is expected to be faster. Windows, and
            what --method names, always run.
        recipe: How to get beyond what the model knows.
        switches: Changes to the recipe.
        output: A .png, .jpg or .webp; of a video an .mp4, or a new folder for its frames as .png
            (default: sample.png or sample.mp4).
        device: cpu, cuda, cuda:1, mps (default: the best one).
    """

    model: Annotated[str | None, WHAT, Parameter(metavar="ID_OR_FOLDER")] = None
    size: Annotated[tuple[int, int] | None, WHAT, SIZE] = None
    frames: Annotated[int | None, WHAT, COUNT] = None
    fps: Annotated[int, WHAT, COUNT, Parameter(metavar="F")] = 16
    steps: Annotated[int | None, WHAT, COUNT] = None
    seed: Annotated[int, WHAT, SEED] = 0
    method: Annotated[
        str | None,
        ATTENTION,
        Parameter(
            metavar="NAME", help=f"One of {', '.join(METHODS)} (default: what suits the model)."
        ),
    ] = None
    knobs: Annotated[
        tuple[str, ...], ATTENTION, Parameter(name="--set", metavar="KNOB=VALUE")
    ] = ()
    always: Annotated[bool, ATTENTION] = False
    recipe: Annotated[
        str | None,
        Parameter(
            group=BEYOND,
            metavar="NAME",
            help=f"Images: {_listed(IMAGE_RECIPES)}. Videos: {_listed(VIDEO_RECIPES)}.",
        ),
    ] = None
    switches: Annotated[Switches, Parameter(name="*")] = Switches()
    output: Annotated[Path | None, OUTPUT, Parameter(name=["--output", "-o"], metavar="FILE")] = (
        None
    )
    device: Annotated[str | None, OUTPUT, Parameter(metavar="NAME")] = None
