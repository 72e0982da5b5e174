"""Draws the same prompts above native size in several variants, measures and shows them.

Of each prompt and factor: the native sample enlarged, direct sampling at full size, windows alone,
and the model's default recipe, with repetition, edge sharpness, seconds and peak memory:

    python benchmarks/studies/high_resolution.py --csv sheet.csv --sheet sheet.jpg

Direct sampling stops at a factor of 4: dense attention over the 65,536 tokens of a factor of 16
would take an hour on a CPU. A step of the full path that guides clips takes minutes there: ask for
`--variants native window` above 4. With `--video FOLDER` (of a Wan pipeline) clips instead.
Every picture is drawn in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name
from time import perf_counter
from typing import Any

import numpy as np

from diffaccel.benchmarks.rows import Column, table, write_rows
from diffaccel.methods import Method
from diffaccel.methods.names import METHODS
from diffaccel.quality.contact_sheet import Shown, write_sheet
from diffaccel.quality.pictures import clip_edge_sharpness, flicker
from diffaccel.quality.repetition import clip_repetition, loop, objects

VARIANTS = ("native", "direct", "window", "recipe")
PROMPTS = ("a red apple on a blue background", "a red apple and a rocket on a blue background")
LARGEST_FACTOR = {"native": 64, "direct": 4, "window": 64, "recipe": 64}


@dataclass(frozen=True, slots=True)
class Job:
    """One picture or clip.

    Args:
        model: Folder; "" for the embedded model.
        prompt: What to draw.
        variant: One of `VARIANTS`.
        factor: Size in terms of the native one, per side.
        seed: Of all noise.
        steps: Denoising steps at native size; None for the preset's.
        refine_steps: Steps of each larger stage; None for the recipe's.
        frames: Of a clip, 0 for a picture.
        device: Where.
    """

    model: str
    prompt: str
    variant: str
    factor: int
    seed: int
    steps: int | None
    refine_steps: int | None
    frames: int
    device: str


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured on one picture or clip; see `diffaccel.quality`.

    `objects` is 0 for clips; `flicker` and `loop` are 0 for pictures.
    """

    key = ("prompt", "variant", "factor", "frames")

    prompt: str
    variant: str
    factor: int
    size: str
    frames: int
    repetition: float
    objects: int
    edge_sharpness: float
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
    return Row(
        prompt=job.prompt,
        variant=job.variant,
        factor=job.factor,
        size=f"{frames.shape[2]}x{frames.shape[1]}",
        frames=len(frames),
        repetition=clip_repetition(frames),
        objects=0 if job.frames else objects(frames[0]),
        edge_sharpness=clip_edge_sharpness(frames, native),
        flicker=flicker(frames),
        loop=loop(frames),
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
            for variant in options.variants:
                if factor > LARGEST_FACTOR[variant]:
                    continue
                job = _job(options, prompt, variant, factor)
                drawn = native if variant == "native" else _apart(job)
                if variant == "native":
                    drawn = replace(drawn, frames=enlarged(native.frames, factor))
                row = measured(job, drawn, native.frames)
                facts = drawn.facts
                rows.append(row)
                shown.append(Shown(f"x{factor} {prompt}", variant, caption(row), drawn.frames))
                print(
                    caption(row), f"[{variant} x{factor}, {prompt}]", file=sys.stderr, flush=True
                )
    print("\n".join(table(rows, COLUMNS)))
    if options.csv:
        write_rows(options.csv, rows, facts)
    if options.sheet:
        write_sheet(options.sheet, shown, tuple(options.variants))
    return 0


def caption(row: Row) -> str:
    """The figures under a picture."""
    return (
        f"repetition {row.repetition:.2f}, edge sharpness {row.edge_sharpness:.2f}, "
        f"{row.seconds:.0f} s, {row.peak_memory_gb:.1f} GB"
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


COLUMNS: dict[str, Column] = {
    "prompt": "{0.prompt}",
    "variant": "{0.variant}",
    "size": "{0.size}",
    "repetition": "{0.repetition:.2f}",
    "objects": "{0.objects}",
    "edge sharpness": "{0.edge_sharpness:.2f}",
    "flicker": "{0.flicker:.2f}",
    "loop": "{0.loop:.2f}",
    "attended": "{0.density:.1%}",
    "s": "{0.seconds:.1f}",
    "GB": "{0.peak_memory_gb:.1f}",
}


def _draw_picture(job: Job) -> tuple[np.ndarray, float]:
    from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
    from diffaccel.pipelines.image import ImageJob, generate_image
    from diffaccel.pipelines.image.presets import preset_for
    from diffaccel.pipelines.loading import load_image_pipeline

    source = job.model or EMBEDDED_IMAGE
    pipe = load_image_pipeline(source, device=job.device)
    preset = preset_for(pipe, source)
    name = preset.recipe if job.variant in ("recipe", "native") else job.variant
    recipe = preset.recipes[name]
    refinement = recipe.refinement
    if job.refine_steps:
        refinement = replace(refinement, steps=job.refine_steps)
    side = preset.native * job.factor
    method = _method(recipe.method, recipe.knobs)
    asked = ImageJob(job.prompt, (side, side), preset, method, refinement, job.steps, job.seed)
    result = generate_image(pipe, asked)
    density: list[Any] = [report.density for report in result.reports.values()][-1:]
    return np.asarray(result.image)[None], density[0] if density else 1.0


def _method(name: str, knobs: Mapping[str, object]) -> Method:
    """Builds a recipe's method with those of the knobs that it has."""
    kind = resolve_name(METHODS[name])
    known = {field.name for field in fields(kind)}
    return kind(**{knob: value for knob, value in knobs.items() if knob in known})


def _draw_clip(job: Job) -> tuple[np.ndarray, float]:
    from diffaccel.pipelines.loading import load_video_pipeline
    from diffaccel.pipelines.video import VideoJob, generate_video
    from diffaccel.pipelines.video.presets import video_preset

    pipe = load_video_pipeline(job.model, device=job.device)
    preset = video_preset(job.model)
    recipe = preset.recipe
    if job.variant == "window":
        recipe = replace(recipe, guide_every=None)
    if job.refine_steps:
        recipe = replace(recipe, steps=max(1, round(job.refine_steps / recipe.strength)))
    native = preset.size_for(pipe)
    width, height = (side * job.factor for side in native)
    asked = VideoJob(
        job.prompt, (width, height), job.frames, recipe=recipe, seed=job.seed,
        steps=job.steps or preset.steps,
        native=(width, height) if job.variant == "direct" else native,
        positions=preset.positions_for(pipe, job.frames),
    )  # fmt: skip
    result = generate_video(pipe, asked)
    frames = (result.frames[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    densities: list[Any] = [report.density for report in result.reports.values()]
    return frames, densities[0] if densities else 1.0


def _apart(job: Job) -> Drawn:
    """Draws a job in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(draw, job).result()


def _job(options: argparse.Namespace, prompt: str, variant: str, factor: int) -> Job:
    return Job(
        model=options.video or options.model,
        prompt=prompt,
        variant=variant,
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
    parser.add_argument("--variants", nargs="+", type=_one_of(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="at native size (default: the preset's)")
    parser.add_argument("--refine-steps", type=int, help="of larger stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write the sheet here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
