"""`diffaccel sample --frames N`: text to a video of any size, with Wan."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from diffaccel.cli.options.argument_types import model_source, usable_device
from diffaccel.cli.options.recipe_options import given_switches
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.cli.options.sample_options import SampleOptions
    from diffaccel.progress import Timing


def sample_video(prompt: str, options: SampleOptions, output: Path) -> int:
    """Checks what is special about videos, then loads, generates and writes."""
    device = usable_device(options.device)
    check_video_options(options)

    from diffaccel.files import check_video_path, write_sidecar, write_video

    check_video_path(output)

    from diffaccel.machine import device_name, package_versions
    from diffaccel.pipelines.loading import load_video_pipeline
    from diffaccel.pipelines.video.presets import video_preset
    from diffaccel.progress import ProgressBars

    started = perf_counter()
    source = video_source(options)
    pipe = load_video_pipeline(source, device=device)
    with ProgressBars() as timing:
        result, recipe = _generate(pipe, prompt, options, timing)
        with timing.phases({"write": 1}):
            write_video(result.frames[0], output, options.fps)
    seconds = perf_counter() - started
    height, width = result.frames.shape[-2:]
    record: dict[str, object] = {
        "command": ["diffaccel", *sys.argv[1:]],
        "prompt": prompt,
        "model": model_source(options.model) or "embedded",
        "size": [width, height],
        "frames": options.frames,
        "fps": options.fps,
        "native": list(result.native),
        "seed": options.seed,
        "steps": options.steps or video_preset(source).steps,
        "recipe": repr(recipe),
        "density": {name: report.density for name, report in result.reports.items()},
        "seconds": {"total": round(seconds, 3), **result.seconds},
        "device": device_name(device),
        "dtype": str(pipe.transformer.dtype),
        "versions": package_versions(),
    }
    write_sidecar(record, output)
    print(f"{output} ({width}x{height}, {options.frames} frames, {seconds:.1f} s)")
    return 0


def check_video_options(options: SampleOptions) -> None:
    """Raises InputError where the options do not suit a video."""
    source = video_source(options)
    if options.model is None and not Path(source).is_dir():
        raise InputError(
            "--frames needs a video model, and this installation has none; pass --model with the "
            "folder or hub name of a Wan pipeline"
        )
    if options.method or options.knobs:
        raise InputError(
            "a video is refined with windows of the model's native size, --method and --set are "
            "for images; leave them out, or use diffaccel.pipelines.video.generate from Python"
        )


def _generate(
    pipe: Any, prompt: str, options: SampleOptions, timing: Timing
) -> tuple[Any, object]:
    """Runs the recipe and returns its result with what it was set to.

    The one place where the command line calls `generate_video` and `generate_long_video`.
    """
    from diffaccel.pipelines.video.generate import generate_video
    from diffaccel.pipelines.video.long_video import TimeWindows, generate_long_video
    from diffaccel.pipelines.video.presets import video_preset

    preset = video_preset(video_source(options))
    common: dict[str, Any] = {
        "steps": options.steps or preset.steps,
        "seed": options.seed,
        "timing": timing,
    }
    width, height = options.size or preset.size_for(pipe)
    frames = cast(int, options.frames)
    recipe = chosen_video_recipe(options)
    if isinstance(recipe, TimeWindows):
        guidance_scale = preset.recipe.guidance_scale
        return generate_long_video(
            pipe, prompt, width, height, frames, windows=recipe,
            guidance_scale=guidance_scale, **common,
        ), recipe  # fmt: skip
    return generate_video(
        pipe, prompt, width, height, frames, recipe=recipe,
        positions=preset.positions_for(pipe, frames), **common
    ), recipe  # fmt: skip


def video_source(options: SampleOptions) -> str | Path:
    """Returns what the video model is loaded from."""
    from diffaccel.pipelines.loading import EMBEDDED_VIDEO

    return model_source(options.model) or EMBEDDED_VIDEO


def chosen_video_recipe(options: SampleOptions) -> Any:
    """Returns what `--recipe` names, with the user's steps and strength."""
    from diffaccel.pipelines.video.presets import video_preset

    preset = video_preset(video_source(options))
    if options.recipe == "windows":
        return preset.windows
    recipe, given = preset.recipe, given_switches(options.switches)
    if "steps" in given:
        recipe = replace(recipe, steps=max(1, round(given["steps"] / recipe.strength)))
    if "strength" in given:
        recipe = replace(recipe, strength=given["strength"])
    return recipe
