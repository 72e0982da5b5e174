"""Draws pictures and clips with several attention methods at equal time, and compares them.

    python benchmarks/studies/block_sparse/drawings.py --csv drawings.csv --sheet drawings.jpg

A native sample is drawn once and redrawn at full size with each method, which then answers every
self-attention call there. `SparseAttn` gets the share of blocks of `--keep`; the others get the
shares with which their calls take as long, by a measurement on calls captured before
(`layers.py --captures`). Time is CPU time of one thread. Dense attention on inputs rounded to
bfloat16 shows what difference is no method's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.benchmarks.rows import Column, table, write_rows
from diffaccel.benchmarks.studies.block_sparse.captures import (
    CLIP_STEPS,
    DRAWINGS,
    Captured,
    Drawing,
    captured,
    hooked,
    pipeline_for,
)
from diffaccel.benchmarks.studies.block_sparse.contenders import BLOCK
from diffaccel.layout import Grid
from diffaccel.machine import device_name, versions_line
from diffaccel.methods import FullAttn, RectifiedSpaAttn, SparseAttn
from diffaccel.methods.base import Method
from diffaccel.methods.block_sparse.sol import SolAttn
from diffaccel.methods.inputs import Attended, AttentionInputs, Position
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE, EMBEDDED_SCORER
from diffaccel.pipelines.image import ImageJob
from diffaccel.pipelines.image.generate import native_drawing, refine_image
from diffaccel.pipelines.image.presets import preset_for
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import generate_video
from diffaccel.pipelines.video.job import VideoJob
from diffaccel.quality.contact_sheet import Shown, write_sheet
from diffaccel.quality.objectives import PromptMatch
from diffaccel.quality.pictures import clip_edge_sharpness, flicker, psnr

PROBED = (0.05, 0.2, 0.4)
"""Shares between which the one of equal time is sought."""
REFERENCE = "SparseAttn"
METHODS: dict[str, Callable[[float], Method]] = {
    REFERENCE: lambda keep: SparseAttn(keep, order="raster", block=BLOCK),
    "SolAttn": lambda keep: SolAttn(keep=keep),
    "RectifiedSpaAttn": lambda keep: RectifiedSpaAttn(
        1.0 - keep, p_remain=0.0, block=BLOCK, order="raster"
    ),
    "selection alone": lambda keep: SparseAttn(
        keep, selector="pooled", corrector="none", order="raster", block=BLOCK
    ),
}
COLUMN_ORDER = ("dense", *METHODS, "bfloat16 inputs")


@dataclass(frozen=True, slots=True)
class Row:
    """One picture or clip against the one of dense attention.

    `attention_s` is CPU time of the self-attention at full size, `density` the mean share of
    query-key pairs there. `edge_sharpness` is 1 where edges are as sharp as the dense ones',
    `match` the prompt match of the scorer, `flicker` the difference of
    `diffaccel.quality.pictures.flicker` to the dense clip's, and `change` the mean difference of
    the changes from frame to frame to those of the dense clip, of 255; both 0 for pictures.
    """

    key = ("prompt", "size", "frames", "method")

    prompt: str
    size: str
    frames: int
    method: str
    keep: float
    density: float
    attention_s: float
    psnr: float
    edge_sharpness: float
    match: float
    flicker: float
    change: float


@dataclass(slots=True)
class AnswerAttention(AttentionHook):
    """Answers the self-attention over one grid with a method, and times it."""

    method: Method
    grid: Grid
    rounds: bool = False
    seconds: float = 0.0
    densities: list[float] = field(default_factory=list)
    is_active = True

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Other grids are those of other stages."""
        if call.layout is None or call.layout.grid != self.grid:
            return compute(call)
        inputs = call.inputs()
        if self.rounds:
            inputs = rounded(inputs)
        started = process_time()
        attended: Attended = self.method.run(inputs, Position())  # without schedule
        self.seconds += process_time() - started
        self.densities.append(float(attended.density))
        return attended.output


def rounded(inputs: AttentionInputs) -> AttentionInputs:
    """The same call with query, key and value rounded to bfloat16, in the dtype they had."""
    tokens = {
        name: getattr(inputs, name).bfloat16().to(inputs.query.dtype)
        for name in ("query", "key", "value")
    }
    return replace(inputs, **tokens)


def seconds_of(method: Method, calls: Sequence[Captured], repeats: int = 2) -> float:
    """CPU time of a method on some calls: the sum of the least of several."""
    total = 0.0
    for call in calls:
        took = []
        for _ in range(repeats):
            started = process_time()
            method.attend(call.query, call.key, call.value, call.layout, scale=call.scale)
            took.append(process_time() - started)
        total += min(took)
    return total


def keep_in(seconds: float, build: Callable[[float], Method], calls: Sequence[Captured]) -> float:
    """Finds the share of blocks with which a method takes so long, straight between probes."""
    took = [seconds_of(build(keep), calls) for keep in PROBED]
    return float(np.clip(np.interp(seconds, took, PROBED), PROBED[0], PROBED[-1]))


def equal_time(keep: float, calls: Sequence[Captured]) -> dict[str, float]:
    """Shares of blocks with which all of `METHODS` take as long as the reference at `keep`."""
    seconds = seconds_of(METHODS[REFERENCE](keep), calls)
    return {
        name: keep if name == REFERENCE else keep_in(seconds, build, calls)
        for name, build in METHODS.items()
    }


def redrawing(pipe: Any, drawing: Drawing, seed: int) -> Callable[[AttentionHook], np.ndarray]:
    """Draws the native sample, and returns what redraws it at full size around a hook.

    Args:
        pipe: Of `pipeline_for`.
        drawing: What to draw.
        seed: Of all noise.

    Returns:
        A function from a hook to (F, H, W, 3) uint8.
    """
    if not drawing.frames:
        preset = preset_for(pipe, EMBEDDED_IMAGE)
        native = native_drawing(pipe, preset)([drawing.prompt], [seed])[0]
        job = ImageJob(drawing.prompt, drawing.size, preset, FullAttn(), seed=seed)

        def redraw(hook: AttentionHook) -> np.ndarray:
            with hooked(pipe.transformer, hook):
                return np.asarray(refine_image(pipe, job, native)[0])[None]

        return redraw

    recipe = FreeSwim(steps=8, guide_every=None)
    asked = VideoJob(
        drawing.prompt, drawing.size, drawing.frames, recipe=recipe, steps=CLIP_STEPS, seed=seed
    )

    def redraw_clip(hook: AttentionHook) -> np.ndarray:
        with hooked(pipe.transformer, hook):
            frames = generate_video(pipe, asked).frames[0].permute(0, 2, 3, 1)
        return (frames * 255).round().byte().numpy()

    return redraw_clip


def compare(drawing: Drawing, keeps: dict[str, float], seed: int) -> list[tuple[Row, np.ndarray]]:
    """Draws with dense attention, all methods and dense attention on rounded inputs."""
    redraw = redrawing(pipeline_for(drawing), drawing, seed)
    scorer = PromptMatch(EMBEDDED_SCORER)
    shown: list[tuple[Row, np.ndarray]] = []
    methods = {name: METHODS[name](keep) for name, keep in keeps.items()}
    for name, method in {"dense": FullAttn(), **methods, "bfloat16 inputs": FullAttn()}.items():
        hook = AnswerAttention(method, drawing.grid, rounds=name == "bfloat16 inputs")
        frames = redraw(hook)
        dense = shown[0][1] if shown else frames
        row = Row(
            drawing.prompt, "x".join(map(str, drawing.size)), drawing.frames, name,
            keeps.get(name, 1.0), fmean(hook.densities), hook.seconds,
            fmean(min(psnr(one, other), 99.0) for one, other in zip(frames, dense, strict=True)),
            clip_edge_sharpness(frames, dense),
            fmean(scorer([Image.fromarray(x) for x in frames], [drawing.prompt] * len(frames))),
            flicker(frames) - flicker(dense), change(frames, dense),
        )  # fmt: skip
        print(*table([row], COLUMNS)[2:], file=sys.stderr, flush=True)
        shown.append((row, frames))
    return shown


def change(clip: np.ndarray, dense: np.ndarray) -> float:
    """Mean difference of the changes from frame to frame, of 255; 0 for a picture."""
    if len(clip) < 2:
        return 0.0
    return float(
        np.abs(np.diff(clip.astype(float), axis=0) - np.diff(dense.astype(float), axis=0)).mean()
    )


COLUMNS: dict[str, Column] = {
    "prompt": "{0.prompt}",
    "size": "{0.size}",
    "frames": "{0.frames}",
    "method": "{0.method}",
    "keep": "{0.keep:.3f}",
    "density": "{0.density:.3f}",
    "attention s": "{0.attention_s:.1f}",
    "PSNR": "{0.psnr:.2f}",
    "edge sharpness": "{0.edge_sharpness:.2f}",
    "match": "{0.match:.3f}",
    "flicker": "{0.flicker:+.3f}",
    "change": "{0.change:.2f}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates, draws, prints, and writes table and sheet where asked."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    chosen = [each for each in DRAWINGS if not each.tunes and options.drawings in each.label]
    if not chosen:
        known = ", ".join(each.label for each in DRAWINGS if not each.tunes)
        print(
            f"--drawings must be part of a label ({known}), got {options.drawings!r}; choose one",
            file=sys.stderr,
        )
        return 2
    cells: list[tuple[Row, np.ndarray]] = []
    with torch.inference_mode():
        for drawing in chosen:
            calls = captured(drawing, options.captures)[:: options.every]
            keeps = equal_time(options.keep, calls)
            cells += compare(drawing, keeps, drawing.seed + options.seed)
    rows = [row for row, _ in cells]
    print("\n".join(table(rows, COLUMNS)))
    if options.csv:
        facts = {"device": device_name("cpu"), "dtype": "float32", "versions": versions_line()}
        write_rows(options.csv, rows, facts)
    if options.sheet:
        write_sheet(options.sheet, [_cell(row, frames) for row, frames in cells], COLUMN_ORDER)
    return 0


def _cell(row: Row, frames: np.ndarray) -> Shown:
    caption = f"{row.psnr:.1f} dB, density {row.density:.2f}, {row.attention_s:.1f} s"
    return Shown(f"{row.prompt} {row.size}", row.method, caption, frames)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.1, help="of SparseAttn")
    parser.add_argument("--captures", type=Path, default=Path("captures"), help="kept here")
    parser.add_argument("--drawings", default="", help="only those with this in their label")
    parser.add_argument("--every", type=int, default=4, help="calls that are timed: every n-th")
    parser.add_argument("--seed", type=int, default=0, help="added to that of each drawing")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write the sheet here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
