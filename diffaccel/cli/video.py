"""`diffaccel sample --frames N`: text to a video of any size, with Wan."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from diffaccel.errors import InputError

RECIPES = ("freeswim", "windows")


def execute(arguments: argparse.Namespace, size: tuple[int, int] | None) -> int:
    """Checks what is special about videos, then loads, generates and writes."""
    check_arguments(arguments)

    from diffaccel.files import check_video_path, write_sidecar, write_video

    check_video_path(arguments.output)

    from diffaccel.machine import device_name, package_versions
    from diffaccel.pipelines.loading import load_video_pipeline
    from diffaccel.pipelines.video.presets import video_preset
    from diffaccel.progress import ProgressBars

    started = perf_counter()
    source = video_source(arguments)
    pipe = load_video_pipeline(source, device=arguments.device)
    with ProgressBars() as timing:
        result, recipe = _generate(pipe, arguments, size, timing)
        with timing.phases({"write": 1}):
            write_video(result.frames[0], arguments.output, arguments.fps)
    seconds = perf_counter() - started
    height, width = result.frames.shape[-2:]
    record = {
        "command": ["diffaccel", *sys.argv[1:]],
        "prompt": arguments.prompt,
        "model": arguments.model or "embedded",
        "size": [width, height],
        "frames": arguments.frames,
        "fps": arguments.fps,
        "native": list(result.native),
        "seed": arguments.seed,
        "steps": arguments.steps or video_preset(source).steps,
        "recipe": repr(recipe),
        "density": {name: report.density for name, report in result.reports.items()},
        "seconds": {"total": round(seconds, 3), **result.seconds},
        "device": device_name(arguments.device),
        "dtype": str(pipe.transformer.dtype),
        "versions": package_versions(),
    }
    write_sidecar(record, arguments.output)
    print(f"{arguments.output} ({width}x{height}, {arguments.frames} frames, {seconds:.1f} s)")
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises InputError where the arguments do not suit a video."""
    source = video_source(arguments)
    if arguments.model is None and not Path(source).is_dir():
        raise InputError(
            "--frames needs a video model, and this installation has none; pass --model with the "
            "folder or hub name of a Wan pipeline"
        )
    if arguments.method or arguments.knobs:
        raise InputError(
            "a video is refined with windows of the model's native size, --method and --set are "
            "for images; leave them out, or use diffaccel.pipelines.video.generate from Python"
        )


def _generate(
    pipe: object, arguments: argparse.Namespace, size: tuple[int, int] | None, timing: object
) -> tuple[object, object]:
    """Runs the recipe and returns its result with what it was set to."""
    from diffaccel.pipelines.video.generate import generate_video
    from diffaccel.pipelines.video.long_video import TimeWindows, generate_long_video
    from diffaccel.pipelines.video.presets import video_preset

    preset = video_preset(video_source(arguments))
    steps = arguments.steps or preset.steps
    common = {"steps": steps, "seed": arguments.seed, "timing": timing}
    width, height = size or preset.size_for(pipe)
    recipe = chosen_video_recipe(arguments)
    if isinstance(recipe, TimeWindows):
        guidance_scale = preset.recipe.guidance_scale
        return generate_long_video(
            pipe, arguments.prompt, width, height, arguments.frames, windows=recipe,
            guidance_scale=guidance_scale, **common,
        ), recipe  # fmt: skip
    return generate_video(
        pipe, arguments.prompt, width, height, arguments.frames, recipe=recipe,
        positions=preset.positions_for(pipe, arguments.frames), **common
    ), recipe  # fmt: skip


def video_source(arguments: argparse.Namespace) -> str | Path:
    """Returns what the video model is loaded from."""
    from diffaccel.pipelines.loading import EMBEDDED_VIDEO

    return arguments.model or EMBEDDED_VIDEO


def chosen_video_recipe(arguments: argparse.Namespace) -> object:
    """Returns what `--recipe` names, with the user's steps and strength."""
    from diffaccel.pipelines.video.presets import video_preset

    preset = video_preset(video_source(arguments))
    if arguments.recipe == "windows":
        return preset.windows
    recipe = preset.recipe
    if arguments.refine_steps:
        recipe = replace(recipe, steps=max(1, round(arguments.refine_steps / recipe.strength)))
    if arguments.strength:
        recipe = replace(recipe, strength=arguments.strength)
    return recipe
