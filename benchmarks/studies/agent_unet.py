"""Sets agent attention and token merging against dense attention on a U-Net pipeline.

Operations and time of a denoising step by size, and what becomes of the pictures:

    python benchmarks/studies/agent_unet.py --model FOLDER --csv agent-unet.csv

Steps are timed with the method on in every step, at every size of `--sizes`; dense attention is
extrapolated with the square of the tokens where its step is expected to take longer than
`--seconds`. Pictures are drawn with the method's own schedule at every size of `--quality-sizes`:
how near they are to those of dense attention in dB of peak signal to noise, and, given a scorer
(a folder of a CLIP model), how well they fit their prompts, with the standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.benchmarks.rows import Column, table, write_rows
from diffaccel.machine import device_name, versions_line
from diffaccel.methods import AgentAttn, Method, TokenMergingAttn
from diffaccel.pipelines.loading import load_image_pipeline
from diffaccel.pipelines.plan.operations import other_flop, served_layers
from diffaccel.quality.contact_sheet import Shown, write_sheet
from diffaccel.quality.objectives import PromptMatch
from diffaccel.quality.pictures import psnr

METHODS: dict[str, Method | None] = {
    "dense": None,
    "AgentAttn()": AgentAttn(),
    'AgentAttn(agents="match")': AgentAttn(agents="match"),
    "AgentAttn(late=TokenMergingAttn(0.4))": AgentAttn(late=TokenMergingAttn(0.4)),
    "TokenMergingAttn(0.5)": TokenMergingAttn(0.5),
}
PROMPTS = (
    "a red apple on a blue background",
    "a rocket on a white background",
    "a cat on a green background",
    "a sailboat on a yellow background",
    "a sunflower on a purple background",
    "a guitar on an orange background",
    "an owl on a pink background",
    "a house on a teal background",
)
SHOWN = 3  # pictures of each size in the contact sheet


@dataclass(frozen=True, slots=True)
class StepRow:
    """Time of one denoising step; GFLOP of one call of the denoiser on one sample."""

    key = ("size", "method")

    size: int
    tokens: int
    method: str
    attention_gflop: float
    other_gflop: float
    seconds: float
    is_extrapolated: bool
    speed_up: float


@dataclass(frozen=True, slots=True)
class PictureRow:
    """Pictures of one method; `seconds` of one picture, `match` is NaN without a scorer."""

    key = ("size", "method")

    size: int
    method: str
    psnr_to_dense: float
    match: float
    match_error: float
    seconds: float


class StepTimer:
    """Times the steps of a pipeline's run, as its `callback_on_step_end`."""

    def __init__(self) -> None:
        self.marks = [perf_counter()]

    def __call__(self, _pipe: Any, _step: int, _time: Any, tensors: dict) -> dict:
        self.marks.append(perf_counter())
        return tensors

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


def using(pipe: Any, method: Method | None) -> Any:
    """Attaches a method for a `with` block."""
    return nullcontext() if method is None else set_attn_processor(pipe, method)


def in_every_step(method: Method | None) -> Method | None:
    """Returns the method without its schedule."""
    return replace(method, stop=1.0) if isinstance(method, AgentAttn) else method


def counted_gflop(pipe: Any, method: Any, size: int) -> tuple[float, float]:
    """GFLOP of attention and of everything else in one call on one sample."""
    model, side = pipe.unet, size // pipe.vae_scale_factor
    text = pipe.tokenizer.model_max_length
    attention = 0.0
    for served in served_layers(model, (side, side), 0):
        share = 1.0
        if method is not None:
            own = method.resolved("sdxl", 1)
            if not own.shape_reason(served.layout):
                share = own.visual_share(served.layout)
        attention += share * served.dense_flop
    return attention / 1e9, other_flop(model, (side, side), text) / 1e9


def step_rows(pipe: Any, sizes: Sequence[int], longest_s: float) -> list[StepRow]:
    """Times steps after the first, with guidance, at every size: the median of five, or one."""
    rows: list[StepRow] = []
    rate = 20.0
    for size in sizes:
        dense_s = 0.0
        for name, method in METHODS.items():
            always = in_every_step(method)
            if isinstance(always, AgentAttn) and always.late != AgentAttn().late:
                continue  # what runs later is never reached
            attention, other = counted_gflop(pipe, always, size)
            expected = 2 * (attention + other) / rate
            if method is not None and expected > longest_s:
                continue
            if expected > longest_s:
                last = [row for row in rows if row.method == "dense"][-1]
                seconds = last.seconds * (attention / last.attention_gflop)
            else:
                timer = StepTimer()
                with using(pipe, always):
                    pipe(PROMPTS[0], height=size, width=size, guidance_scale=3.0,
                         num_inference_steps=2 if expected > longest_s / 20 else 6,
                         output_type="latent", callback_on_step_end=timer)  # fmt: skip
                seconds = median(timer.seconds[1:])
                if method is None:
                    rate = 2 * (attention + other) / seconds
            dense_s = seconds if method is None else dense_s
            rows.append(StepRow(
                size, (size // pipe.vae_scale_factor) ** 2, name, attention, other, seconds,
                expected > longest_s, dense_s / seconds,
            ))  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def picture_rows(
    pipe: Any, sizes: Sequence[int], steps: int, count: int, scorer: Path | None
) -> tuple[list[PictureRow], list[Shown]]:
    """Draws `count` pictures at every size with every method, and compares them.

    Returns:
        The measures, and the first pictures of every size for a contact sheet.
    """
    match = None if scorer is None else PromptMatch(scorer)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    rows: list[PictureRow] = []
    shown: list[Shown] = []
    for size in sizes:
        exact: list[np.ndarray] = []
        for name, method in METHODS.items():
            started = perf_counter()
            with using(pipe, method):
                pictures = [draw(pipe, prompt, size, steps, i) for i, prompt in enumerate(prompts)]
            seconds = (perf_counter() - started) / count
            found = [np.asarray(picture) for picture in pictures]
            exact = exact or found
            near = [psnr(a, b) for a, b in zip(found, exact, strict=True)]
            scores = [float("nan")] if match is None else match(pictures, prompts)
            error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
            rows.append(PictureRow(size, name, fmean(near), fmean(scores), error, seconds))
            print(rows[-1], file=sys.stderr, flush=True)
            for i in range(min(count, SHOWN)):
                caption = "" if method is None else f"{near[i]:.1f} dB to dense"
                shown.append(Shown(f"{size} px: {prompts[i]}", name, caption, found[i][None]))
    return rows, shown


def draw(pipe: Any, prompt: str, size: int, steps: int, seed: int) -> Image.Image:
    """Draws one picture."""
    return pipe(
        prompt, height=size, width=size, num_inference_steps=steps, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip


STEP_COLUMNS: dict[str, Column] = {
    "pixels": "{0.size}",
    "tokens": "{0.tokens}",
    "method": "{0.method}",
    "attention, GFLOP": "{0.attention_gflop:.2f}",
    "all, GFLOP": lambda row: f"{row.attention_gflop + row.other_gflop:.2f}",
    "step, s": lambda row: f"{row.seconds:.2f}" + " (extrapolated)" * row.is_extrapolated,
    "speed-up": "{0.speed_up:.2f}",
}
PICTURE_COLUMNS: dict[str, Column] = {
    "pixels": "{0.size}",
    "method": "{0.method}",
    "dB to dense": "{0.psnr_to_dense:.1f}",
    "prompt match": "{0.match:.3f} ± {0.match_error:.3f}",
    "picture, s": "{0.seconds:.1f}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes the tables where asked."""
    options = _parser().parse_args(argv)
    pipe = load_image_pipeline(options.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    steps = step_rows(pipe, options.sizes, options.seconds)
    pictures, shown = picture_rows(
        pipe, options.quality_sizes, options.steps, options.count, options.scorer
    )
    print("\n".join([*table(steps, STEP_COLUMNS), "", *table(pictures, PICTURE_COLUMNS)]))
    if options.sheet:
        write_sheet(options.sheet, shown, tuple(METHODS))
    if options.csv:
        versions = versions_line()
        facts = {"device": device_name("cpu"), "dtype": "float32", "versions": versions}
        write_rows(options.csv, steps, facts)
        quality = options.csv.with_stem(f"{options.csv.stem}-quality")
        write_rows(quality, pictures, facts | {"steps": str(options.steps)})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--scorer", type=Path, help="folder of a CLIP model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--quality-sizes", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=16, help="pictures of each method and size")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest step to measure")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--sheet", type=Path, help="contact sheet of the first pictures, .jpg")
    return parser


if __name__ == "__main__":
    sys.exit(main())
