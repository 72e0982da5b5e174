"""`diffaccel sample --frames N`: text to a video of any size."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from diffaccel.cli.dense_calls import described, recorded
from diffaccel.cli.options.argument_types import model_source, usable_device
from diffaccel.cli.options.recipe_options import given_switches
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.cli.options.sample_options import SampleOptions
    from diffaccel.pipelines.video.freeswim import FreeSwim
    from diffaccel.pipelines.video.job import VideoJob
    from diffaccel.pipelines.video.long_video import TimeWindows
    from diffaccel.pipelines.video.presets import VideoPreset


def sample_video(prompt: str, options: SampleOptions, output: Path) -> int:
    """Checks what is special about videos, then loads, generates and writes."""
    device = usable_device(options.device)
    check_video_options(options)

    from diffaccel.files import check_video_path, write_sidecar, write_sound, write_video

    check_video_path(output)

    from diffaccel.attach.attachment import denoisers
    from diffaccel.machine import device_name, package_versions
    from diffaccel.pipelines.image.presets import SUPPORTED_VIDEO
    from diffaccel.pipelines.loading import check_folder, load_video_pipeline
    from diffaccel.pipelines.video.generate import (
        check_video_size,
        check_windows,
        generate_video,
    )
    from diffaccel.progress import ProgressBars

    source = Path(video_source(options))
    if options.recipe == "windows" and source.is_dir():
        check_windows(check_folder(source, SUPPORTED_VIDEO))
    started = perf_counter()
    pipe = load_video_pipeline(video_source(options), device=device)
    job = video_job(pipe, prompt, options)
    check_video_size(pipe, *job.size, job.frames)
    with ProgressBars() as timing:
        result = generate_video(pipe, job, timing=timing)
        sound = None if result.audio is None else output.with_suffix(".wav")
        with timing.phases({"write": 1}):
            write_video(result.frames[0], output, options.fps)
            if sound is not None and result.audio is not None:
                write_sound(result.audio[0], sound, result.sampling_rate)
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
        "sound": None if sound is None else sound.name,
        "seed": options.seed,
        "steps": job.steps,
        "recipe": repr(job.recipe),
        "density": {name: report.density for name, report in result.reports.items()},
        "attention": recorded(result.reports),
        "seconds": {"total": round(seconds, 3), **result.seconds},
        "device": device_name(device),
        "dtype": str(next(iter(denoisers(pipe).values())).dtype),
        "versions": package_versions(),
    }
    write_sidecar(record, output)
    print(f"{output} ({width}x{height}, {options.frames} frames, {seconds:.1f} s)")
    for name, report in result.reports.items():
        if line := described(name, report):
            print(line)
    return 0


def check_video_options(options: SampleOptions) -> None:
    """Raises InputError where the options do not suit a video."""
    source = video_source(options)
    if options.model is None and not Path(source).is_dir():
        raise InputError(
            "--frames needs a video model, and this installation has none; pass --model with the "
            "folder or hub name of a video pipeline"
        )
    if options.method or options.knobs:
        raise InputError(
            "a video is refined with windows of the model's native size, --method and --set are "
            "for images; leave them out, or use diffaccel.pipelines.video.generate from Python"
        )


def video_job(pipe: Any, prompt: str | None, options: SampleOptions) -> VideoJob:
    """Returns what is asked for, with what the model's preset says.

    Args:
        pipe: The pipeline, or its outline.
        prompt: What happens.
        options: Checked ones.
    """
    from diffaccel.pipelines.video.freeswim import FreeSwim
    from diffaccel.pipelines.video.job import VideoJob
    from diffaccel.pipelines.video.presets import video_preset

    class_name = getattr(pipe, "class_name", type(pipe).__name__)
    preset = video_preset(video_source(options), class_name)
    recipe = _chosen_recipe(preset, options)
    is_whole = isinstance(recipe, FreeSwim)
    frames = cast(int, options.frames)
    return VideoJob(
        prompt,
        options.size or preset.size_for(pipe),
        frames,
        recipe=recipe,
        steps=options.steps or preset.steps,
        seed=options.seed,
        positions=preset.positions_for(pipe, frames) if is_whole else None,
    )


def video_source(options: SampleOptions) -> str | Path:
    """Returns what the video model is loaded from."""
    from diffaccel.pipelines.embedded import EMBEDDED_VIDEO

    return model_source(options.model) or EMBEDDED_VIDEO


def _chosen_recipe(preset: VideoPreset, options: SampleOptions) -> FreeSwim | TimeWindows:
    """Returns what `--recipe` names, with the user's steps and strength."""
    if options.recipe == "windows":
        return preset.windows
    recipe, given = preset.recipe, given_switches(options.switches)
    if options.recipe == "cascade":
        # Each stage redraws less than one jump would: what is there already is larger.
        recipe = replace(recipe, max_upscale=2.0, strength=0.7 * recipe.strength)
    if "steps" in given:
        recipe = replace(recipe, steps=max(1, round(given["steps"] / recipe.strength)))
    if "strength" in given:
        recipe = replace(recipe, strength=given["strength"])
    return recipe
