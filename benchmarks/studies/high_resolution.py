"""Draws the same prompts above native size in several ways, measures them and shows them together.

Of each prompt and factor: the native sample enlarged, direct sampling at full size, windows alone,
and the model's default recipe, with repetition, sharpness, seconds and peak memory:

    python benchmarks/high_resolution.py --csv sheet.csv --sheet sheet.jpg

Direct sampling stops at a factor of 4: dense attention over the 65,536 tokens of a factor of 16
would take an hour on a CPU. A step of the full path that guides clips takes minutes there: ask for
`--ways native window` above 4. With `--video FOLDER` (of a Wan pipeline) clips instead.
Every picture is drawn in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np

from diffaccel.benchmarks.rows import write_rows
from diffaccel.quality.contact_sheet import Shown, write_sheet
from diffaccel.quality.pictures import (
    clip_repetition,
    clip_sharpness,
    flicker,
    loop,
    objects,
    repetition,
    sharpness,
)

WAYS = ("native", "direct", "window", "recipe")
PROMPTS = ("a red apple on a blue background", "a red apple and a rocket on a blue background")
LARGEST_FACTOR = {"native": 64, "direct": 4, "window": 64, "recipe": 64}


@dataclass(frozen=True, slots=True)
class Job:
    """One picture or clip.

    Args:
        model: Folder; "" for the embedded model.
        prompt: What to draw.
        way: One of `WAYS`.
        factor: Size in terms of the native one, per side.
        seed: Of all noise.
        steps: Denoising steps at native size; None for the preset's.
        refine_steps: Steps of each larger stage; None for the recipe's.
        frames: Of a clip, 0 for a picture.
        device: Where.
    """

    model: str
    prompt: str
    way: str
    factor: int
    seed: int
    steps: int | None
    refine_steps: int | None
    frames: int
    device: str


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured on one picture or clip; see `picture_measures`.

    `objects` is 0 for clips; `flicker` and `loop` are 0 for pictures.
    """

    prompt: str
    way: str
    factor: int
    size: str
    frames: int
    repetition: float
    objects: int
    sharpness: float
    flicker: float
    loop: float
    seconds: float
    peak_memory_gb: float
    density: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture (1, H, W, 3) or clip (F, H, W, 3), uint8, and what it took."""

    frames: np.ndarray
    seconds: float
    peak_memory_gb: float
    density: float
    facts: dict[str, str]


def draw(job: Job) -> Drawn:
    """Draws one job in this process."""
    import torch

    from diffaccel.machine import device_name, versions_line

    started = perf_counter()
    frames, density = (_draw_clip if job.frames else _draw_picture)(job)
    seconds = perf_counter() - started
    if job.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(job.device) / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    versions = versions_line()
    facts = {"device": device_name(job.device), "versions": versions, "seed": str(job.seed)}
    return Drawn(frames, seconds, peak, density, facts)


def measured(job: Job, drawn: Drawn, native: np.ndarray) -> Row:
    """Measures one job against the native picture or clip."""
    frames = drawn.frames
    is_clip = job.frames > 0
    return Row(
        prompt=job.prompt,
        way=job.way,
        factor=job.factor,
        size=f"{frames.shape[2]}x{frames.shape[1]}",
        frames=len(frames),
        repetition=clip_repetition(frames) if is_clip else repetition(frames[0]),
        objects=0 if is_clip else objects(frames[0]),
        sharpness=clip_sharpness(frames, native) if is_clip else sharpness(frames[0], native[0]),
        flicker=flicker(frames),
        loop=loop(frames) if is_clip else 0.0,
        seconds=drawn.seconds,
        peak_memory_gb=drawn.peak_memory_gb,
        density=drawn.density,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draws, measures, prints, and writes table and sheet where asked."""
    options = _parser().parse_args(argv)
    rows, shown, facts = [], [], {}
    for prompt in options.prompts:
        native = _apart(_job(options, prompt, "native", 1))
        for factor in options.factors:
            for way in options.ways:
                if factor > LARGEST_FACTOR[way]:
                    continue
                job = _job(options, prompt, way, factor)
                drawn = native if way == "native" else _apart(job)
                if way == "native":
                    drawn = replace(drawn, frames=enlarged(native.frames, factor))
                row = measured(job, drawn, native.frames)
                facts = drawn.facts
                rows.append(row)
                shown.append(Shown(f"x{factor} {prompt}", way, caption(row), drawn.frames))
                print(caption(row), f"[{way} x{factor}, {prompt}]", file=sys.stderr, flush=True)
    print(as_markdown(rows))
    if options.csv:
        write_rows(options.csv, rows, facts)
    if options.sheet:
        write_sheet(options.sheet, shown, tuple(options.ways))
    return 0


def caption(row: Row) -> str:
    """The figures under a picture."""
    return (
        f"repetition {row.repetition:.2f}, sharpness {row.sharpness:.2f}, {row.seconds:.0f} s, "
        f"{row.peak_memory_gb:.1f} GB"
    )


def enlarged(frames: np.ndarray, factor: int) -> np.ndarray:
    """Frames (F, H, W, 3) uint8, `factor` times as large, by Lanczos interpolation."""
    from PIL import Image

    size = (frames.shape[2] * factor, frames.shape[1] * factor)
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
            for frame in frames
        ]
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """Writes the rows as a table."""
    lines = [
        "| prompt | way | size | repetition | objects | sharpness | flicker | loop | attended | s "
        "| GB |",
        "|---" * 11 + "|",
    ]
    lines += [
        f"| {row.prompt} | {row.way} | {row.size} | {row.repetition:.2f} | {row.objects} | "
        f"{row.sharpness:.2f} | {row.flicker:.2f} | {row.loop:.2f} | {row.density:.1%} | "
        f"{row.seconds:.1f} | {row.peak_memory_gb:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _draw_picture(job: Job) -> tuple[np.ndarray, float]:
    from diffaccel.cli.options.method_options import parse_method
    from diffaccel.pipelines.image.generate import generate_image
    from diffaccel.pipelines.image.presets import preset_for
    from diffaccel.pipelines.loading import EMBEDDED_IMAGE, load_image_pipeline

    source = job.model or EMBEDDED_IMAGE
    pipe = load_image_pipeline(source, device=job.device)
    preset = preset_for(pipe, source)
    name = preset.recipe if job.way in ("recipe", "native") else job.way
    recipe = preset.recipes[name]
    refinement = recipe.refinement
    if job.refine_steps:
        refinement = replace(refinement, steps=job.refine_steps)
    side = preset.native * job.factor
    result = generate_image(
        pipe, job.prompt, side, side, preset=preset, refinement=refinement,
        method=parse_method(recipe.method, [], recipe.knobs), steps=job.steps, seed=job.seed,
    )  # fmt: skip
    density = [report.density for report in result.reports.values()][-1:]
    return np.asarray(result.image)[None], density[0] if density else 1.0


def _draw_clip(job: Job) -> tuple[np.ndarray, float]:
    from diffaccel.pipelines.loading import load_video_pipeline
    from diffaccel.pipelines.video.generate import generate_video
    from diffaccel.pipelines.video.presets import video_preset

    pipe = load_video_pipeline(job.model, device=job.device)
    preset = video_preset(job.model)
    recipe = preset.recipe
    if job.way == "window":
        recipe = replace(recipe, guide_every=None)
    if job.refine_steps:
        recipe = replace(recipe, steps=max(1, round(job.refine_steps / recipe.strength)))
    native = preset.size_for(pipe)
    width, height = (side * job.factor for side in native)
    result = generate_video(
        pipe, job.prompt, width, height, job.frames, recipe=recipe, seed=job.seed,
        steps=job.steps or preset.steps,
        native=(width, height) if job.way == "direct" else native,
        positions=preset.positions_for(pipe, job.frames),
    )  # fmt: skip
    frames = (result.frames[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    densities = [report.density for report in result.reports.values()]
    return frames, densities[0] if densities else 1.0


def _apart(job: Job) -> Drawn:
    """Draws a job in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(draw, job).result()


def _job(options: argparse.Namespace, prompt: str, way: str, factor: int) -> Job:
    return Job(
        model=options.video or options.model,
        prompt=prompt,
        way=way,
        factor=factor,
        seed=options.seed,
        steps=options.steps,
        refine_steps=options.refine_steps,
        frames=options.frames if options.video else 0,
        device=options.device,
    )


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}, got {text}")
        return text

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="image folder (default: the embedded model)")
    parser.add_argument("--video", default="", metavar="FOLDER", help="of a Wan pipeline: clips")
    parser.add_argument("--frames", type=int, default=17, help="of a clip")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--factors", nargs="+", type=int, default=[2, 4, 16], help="per side")
    parser.add_argument("--ways", nargs="+", type=_one_of(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, help="at native size (default: the preset's)")
    parser.add_argument("--refine-steps", type=int, help="of larger stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write the sheet here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
