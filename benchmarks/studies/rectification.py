"""Measures what rectification buys: output error against dense attention, on real tensors.

Captures query, key and value of every attention layer while the embedded image model draws above
its native size (upscaled, noised part of the way, denoised), then runs each method on the same
tensors with the same selection of blocks:

    python benchmarks/studies/rectification.py --size 1024 --csv rectification.csv
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.attach.attachment import add_attention_hook, remove_attention_hook
from diffaccel.attach.call import AttentionCall, AttentionHook
from diffaccel.benchmarks.rows import Column, facts_list, table, write_rows
from diffaccel.bindings import binding_of
from diffaccel.layout import TokenLayout
from diffaccel.machine import device_name, versions_line
from diffaccel.methods import FullAttn, Method, RectifiedSpaAttn, SparseAttn
from diffaccel.methods.inputs import AttentionInputs
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.image import ImageJob, generate_image
from diffaccel.pipelines.image.presets import Preset, preset_for
from diffaccel.pipelines.loading import load_image_pipeline

PROMPTS = ("a red apple", "a cat", "a yellow house and a tree")
PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """Inputs of one attention call, (B, N, H, D) each, and where they come from."""

    prompt: str
    step: int
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    scale: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: means over all captured calls.

    `error` is the mean of |output - dense| / |dense| over visual rows (Frobenius norms),
    `density` the share of query-key pairs that is computed exactly.
    """

    key = ("drop", "method")

    drop: float
    method: str
    error: float
    worst: float
    density: float
    calls: int


class CaptureAttention(AttentionHook):
    """Keeps the inputs of the attention calls over one grid; results stay unchanged."""

    is_active = True

    def __init__(self, prompt: str, tokens: tuple[int, int], steps: Sequence[int]) -> None:
        self.captured: list[Captured] = []
        self._prompt, self._tokens, self._steps = prompt, tokens, steps
        self._calls: Counter[int] = Counter()

    def attend(self, call: AttentionCall, compute: Callable[[AttentionCall], Tensor]) -> Tensor:
        """Answers as without the hook; other grids are those of other stages."""
        layout = call.layout
        if layout is not None and layout.grid == (1, *self._tokens):
            step = self._calls[call.layer.index]
            self._calls[call.layer.index] += 1
            if step in self._steps:
                self._keep(call.layer.index, step, call.inputs())
        return compute(call)

    def _keep(self, layer: int, step: int, inputs: AttentionInputs) -> None:
        query, key, value = (x.clone() for x in (inputs.query, inputs.key, inputs.value))
        self.captured.append(
            Captured(self._prompt, step, layer, query, key, value, inputs.layout, inputs.scale)
        )


def capture(
    pipe: Any,
    prompt: str,
    size: int,
    steps: Sequence[int],
    preset: Preset,
    seed: int = 0,
) -> list[Captured]:
    """Draws one picture of size x size pixels with dense attention and captures the last stage.

    Args:
        pipe: A pipeline whose denoiser is a transformer.
        prompt: What to draw.
        size: In pixels, a multiple of 16, above the native size.
        steps: Which denoising steps of the last stage to capture, from 0.
        preset: How the pipeline is called.
        seed: Of all noise.
    """
    side = size // PIXELS_PER_TOKEN
    hook = CaptureAttention(prompt, (side, side), steps)
    job = ImageJob(prompt, (size, size), preset, FullAttn(), seed=seed)
    with capturing(pipe.transformer, hook), torch.inference_mode():
        generate_image(pipe, job)
    return hook.captured


@contextmanager
def capturing(model: nn.Module, hook: CaptureAttention) -> Iterator[None]:
    """Lets a hook see the self-attention of a denoiser."""
    names = tuple(layer.name for layer in binding_of(model).layers(model))
    add_attention_hook(model, hook, names)
    try:
        yield
    finally:
        remove_attention_hook(model, hook)


def compared(drop: float, block: int, p_remain: float) -> dict[str, Method]:
    """Methods that select the same blocks and differ in what they do about the rest."""
    shared: dict[str, Any] = {"block": block, "p_remain": p_remain, "neighbors": True}
    return {
        "SparseAttn": SparseAttn(keep=1.0 - drop, **shared),
        "RectifiedSpaAttn(gapr=True)": RectifiedSpaAttn(drop, gapr=True, **shared),
        "RectifiedSpaAttn(gapr=False)": RectifiedSpaAttn(drop, gapr=False, **shared),
        'RectifiedSpaAttn(correction="centroids")': RectifiedSpaAttn(
            drop, correction="centroids", **shared
        ),
    }


def measure(
    calls: Sequence[Captured], drops: Sequence[float], block: int, p_remain: float
) -> list[Row]:
    """Runs every method on every captured call."""
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for call in calls:
        tokens = (call.query, call.key, call.value, call.layout)
        visual = call.layout.visual_slice
        dense = FullAttn().attend(*tokens, scale=call.scale)[:, visual].float()
        for drop in drops:
            for name, method in compared(drop, block, p_remain).items():
                output, density = method.attend_with_density(*tokens, scale=call.scale)
                error = (output[:, visual].float() - dense).norm() / dense.norm()
                found.setdefault((drop, name), []).append((float(error), float(density)))
    return [
        Row(drop, name, fmean(errors), max(errors), fmean(densities), len(errors))
        for (drop, name), pairs in found.items()
        for errors, densities in [tuple(zip(*pairs, strict=True))]
    ]


COLUMNS: dict[str, Column] = {
    "drop": "{0.drop:g}",
    "method": "{0.method}",
    "mean error": "{0.error:.3f}",
    "worst error": "{0.worst:.3f}",
    "density": "{0.density:.3f}",
    "calls": "{0.calls}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Captures, measures, prints; returns the exit code."""
    options = _parser().parse_args(argv)
    device = options.device
    pipe = load_image_pipeline(options.model, device=device)
    preset = preset_for(pipe, options.model)
    calls: list[Captured] = []
    for prompt in options.prompts:
        with _saying(f"capturing {prompt!r} at {options.size}x{options.size}"):
            calls += capture(pipe, prompt, options.size, options.steps, preset, options.seed)
    if not calls:
        print("no attention call was captured; pass a --size above native", file=sys.stderr)
        return 1
    with _saying(f"comparing on {len(calls)} attention calls"), torch.inference_mode():
        rows = measure(calls, options.drops, options.block, options.p_remain)
    first = calls[0]
    facts = {
        "device": device_name(device),
        "dtype": str(first.query.dtype).removeprefix("torch."),
        "shape": f"(B, N, H, D) = {tuple(first.query.shape)}, {first.layout}",
        "selection": f"block={options.block}, p_remain={options.p_remain}, neighbors=True, "
        "order=hilbert",
        "calls": f"{len(options.prompts)} prompts, steps {options.steps}, "
        f"{1 + max(call.layer for call in calls)} layers, seed {options.seed}",
        "versions": versions_line(),
    }
    print("\n".join([*facts_list(facts), "", *table(rows, COLUMNS)]))
    if options.csv:
        write_rows(options.csv, rows, facts)
    return 0


@contextmanager
def _saying(what: str) -> Iterator[None]:
    print(f"{what} ...", file=sys.stderr, flush=True)
    yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_IMAGE, help="diffusers folder of a FLUX model")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1], help="steps to capture")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--block", type=int, default=128, help="tokens per block")
    parser.add_argument("--p-remain", type=float, default=0.0, help="least mass computed exactly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
