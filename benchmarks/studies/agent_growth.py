"""Measures how agent attention grows with the picture, beside dense attention and token merging.

One self-attention of a U-Net, latents of 16 x 16 to 512 x 512, one token for each latent element:

    python benchmarks/studies/agent_growth.py --csv benchmarks/results/agent-growth-cpu.csv

Tokens are drawn so that they resemble those of a picture: features of pink noise over the grid,
the same picture at every size, normalised and projected to query, key and value. The error is
against exact rows of dense attention, sampled over the picture; it is that of one attention, not
of a finished picture. Where dense attention or a method would take longer than `--seconds`, its
time is not measured: that of dense attention is then extrapolated with the square of the tokens
from the largest size measured, that of a method is left out.

With `--embedded`, the tokens are those of the embedded model in its attention at 1024 x 1024
pixels instead (64 x 64 tokens beside 32 of text, rotary positions):

    python benchmarks/studies/agent_growth.py --embedded
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate, layer_norm

from diffaccel.benchmarks.rows import Column, facts_list, table, write_rows
from diffaccel.benchmarks.studies.block_sparse.captures import Drawing, capture
from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.machine import device_name, versions_line
from diffaccel.methods import AgentAttn, Method, SparseAttn, TokenMergingAttn
from diffaccel.methods.grouped.base import GroupedMethod
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from diffaccel.pipelines.loading import load_image_pipeline

SIDES = (16, 24, 32, 48, 64, 128, 256, 512)
ROWS = 256
"""Exact rows that an error is taken over."""

BUDGET_S = 0.3
"""Calls of one method at one size repeat until they took so long, three times at least."""

LONG_S = 2.0
"""A call that takes so long is made once."""

METHODS: dict[str, GroupedMethod] = {
    name: replace(cast(AgentAttn, method), least_tokens=0)
    for name, method in {
        "AgentAttn()": AgentAttn(),
        "AgentAttn() as on U-Nets": AgentAttn().resolved("sdxl", 70),
        "AgentAttn(most_agents=None)": AgentAttn(most_agents=None),
        'AgentAttn(agents="match")': AgentAttn(agents="match"),
        "TokenMergingAttn(0.5)": TokenMergingAttn(0.5),
    }.items()
}
"""With `least_tokens=0`, so that sizes are measured that run dense by default."""

EMBEDDED_METHODS: dict[str, Method] = {
    'AgentAttn(agents="middle")': AgentAttn(agents="middle"),
    'AgentAttn(agents="pool")': AgentAttn(agents="pool"),
    'AgentAttn(agents="match")': AgentAttn(agents="match"),
    'AgentAttn(8, agents="middle")': AgentAttn(8, agents="middle"),
    'AgentAttn(8, agents="pool")': AgentAttn(8, agents="pool"),
    "TokenMergingAttn(0.4)": TokenMergingAttn(0.4),
    "TokenMergingAttn(0.7)": TokenMergingAttn(0.7),
    "plain selection of 10 %": SparseAttn(
        0.1, neighbors=True, selector="pooled", corrector="none"
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one size; times in seconds of one call, errors as shares of dense output."""

    key = ("side", "method")

    side: int
    tokens: int
    method: str
    agents: int | None
    gflop: float
    flop_share: float
    seconds: float
    is_extrapolated: bool
    speed_up: float
    error: float
    repetitions: int


def draw_tokens(side: int, heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws query, key and value (1, side * side, heads, dim) of one picture.

    Waves of each octave up to the grid have one amplitude, as in pictures. A quarter of a key's
    variance is that of the query, so that tokens attend what resembles them, and two fifths of a
    value are common to all. With that, 64 x 64 tokens resemble those of the embedded model at
    1024 x 1024 pixels: neighbouring queries correlate by 0.7 (there 0.8 to 0.9), attention has an
    entropy of 5.6 nats (5.2 to 6.6), and the 64 largest weights sum to 0.55 (0.38 to 0.65).
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(1, 2 * dim, side, side)
    nodes = 2
    while nodes <= max(SIDES):
        octave = torch.randn(1, 2 * dim, nodes, nodes, generator=generator)
        if nodes <= side:
            size = (side, side)
            features += interpolate(octave, size=size, mode="bicubic", align_corners=False)
        nodes *= 2
    features = layer_norm(features.flatten(2).transpose(1, 2), (2 * dim,))
    weights = torch.randn(3, heads, 2 * dim, dim, generator=generator) / (2 * dim) ** 0.5
    weights[1] = 0.5 * weights[0] + 0.75**0.5 * weights[1]
    query, key, value = (torch.einsum("bnc,hcd->bnhd", features, w) for w in weights)
    common = torch.randn(heads, dim, generator=generator)
    return 2**0.5 * query, 2**0.5 * key, 0.6**0.5 * value + 0.4**0.5 * common


def gflop(method: GroupedMethod | None, layout: TokenLayout, heads: int, dim: int) -> float:
    """Multiplications and additions of the two products of attention; dense without a method."""
    share = 1.0 if method is None or method.shape_reason(layout) else method.visual_share(layout)
    return 4e-9 * share * layout.length**2 * heads * dim


def timed(call: Callable[[], Tensor]) -> tuple[list[float], Tensor]:
    """Repeats a call within its budget; the first one counts only where it is long."""
    samples: list[float] = []
    while len(samples) < 4 or sum(samples[1:]) < BUDGET_S:
        start = perf_counter()
        output = call()
        samples.append(perf_counter() - start)
        if samples[0] >= LONG_S:
            return samples, output
    return samples[1:], output


def measure(side: int, heads: int, dim: int, seed: int, rate: float, seconds: float) -> list[Row]:
    """Measures dense attention and all methods at one size.

    Args:
        side: Tokens along a side.
        heads: H.
        dim: D.
        seed: Of the tokens.
        rate: GFLOP/s that dense attention reached at the size before.
        seconds: Calls expected to take longer are left out.
    """
    layout = TokenLayout.image(side, side)
    tokens = draw_tokens(side, heads, dim, seed)
    sampled = torch.linspace(0, layout.length - 1, min(ROWS, layout.length)).long()
    exact = dense_attention(tokens[0][:, sampled], *tokens[1:])
    everything = gflop(None, layout, heads, dim)
    rows: list[Row] = []

    def add(name: str, method: GroupedMethod | None, call: Callable[[], Tensor]) -> None:
        work = gflop(method, layout, heads, dim)
        agents = method.cells((1, side, side)).number if isinstance(method, AgentAttn) else None
        if work / rate > seconds:
            if method is None:  # the first row of a size: the others are set against it
                rows.append(Row(side, layout.length, name, None, work, 1.0, everything / rate,
                                True, 1.0, 0.0, 0))  # fmt: skip
            return
        samples, output = timed(call)
        error = float((output[:, sampled] - exact).norm() / exact.norm())
        dense = rows[0].seconds if rows else median(samples)
        rows.append(Row(
            side, layout.length, name, agents, work, work / everything, median(samples), False,
            dense / median(samples), error, len(samples),
        ))  # fmt: skip

    add("FullAttn()", None, lambda: dense_attention(*tokens))
    for name, method in METHODS.items():
        if not method.shape_reason(layout):
            add(name, method, partial(method.attend, *tokens, layout))
    return rows


def growth(rows: Sequence[Row], start: int, stop: int) -> dict[str, tuple[float, float]]:
    """Exponents of multiplications and of time in the number of tokens, by method."""
    found = {}
    for name in dict.fromkeys(row.method for row in rows):
        by_side = {row.side: row for row in rows if row.method == name}
        if start in by_side and stop in by_side:
            first, last = by_side[start], by_side[stop]
            tokens = log(last.tokens / first.tokens)
            found[name] = (
                log(last.gflop / first.gflop) / tokens,
                log(last.seconds / first.seconds) / tokens,
            )
    return found


def measure_embedded(prompt: str, seed: int) -> str:
    """Runs all methods on the embedded model's own tokens; returns the table."""
    pipe = load_image_pipeline(EMBEDDED_IMAGE, device="cpu")
    calls = capture(pipe, Drawing(prompt, (1024, 1024), (0, 1), seed=seed))
    found: dict[str, list[tuple[float, float]]] = {}
    for call in calls:
        tokens, visual = (call.query, call.key, call.value), call.layout.visual_slice

        def dense(tokens: Sequence[Tensor] = tokens, scale: float | None = call.scale) -> Tensor:
            return dense_attention(*tokens, scale=scale)

        samples, exact = timed(dense)
        found.setdefault("FullAttn()", []).append((median(samples), 0.0))
        exact = exact[:, visual]
        for name, method in EMBEDDED_METHODS.items():
            start = perf_counter()
            output = method.attend(*tokens, call.layout, scale=call.scale)[:, visual]
            seconds = perf_counter() - start
            error = float((output - exact).norm() / exact.norm())
            found.setdefault(name, []).append((seconds, error))
    lines = [f"{len(calls)} calls, {prompt!r}", "", "| method | median, ms | mean error |"]
    lines.append("|---|---|---|")
    for name, pairs in found.items():
        milliseconds = 1e3 * median(seconds for seconds, _ in pairs)
        error = fmean(error for _, error in pairs)
        lines.append(f"| {name} | {milliseconds:.1f} | {error:.3f} |")
    return "\n".join(lines)


COLUMNS: dict[str, Column] = {
    "latents": "{0.side}x{0.side}",
    "method": "{0.method}",
    "agents": lambda row: str(row.agents or ""),
    "GFLOP": "{0.gflop:.3g}",
    "seconds": lambda row: f"{row.seconds:.4f}" + " (extrapolated)" * row.is_extrapolated,
    "speed-up": "{0.speed_up:.1f}",
    "error": "{0.error:.3f}",
}


def as_markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """Writes the facts that decide about the numbers, then table and exponents."""
    lines = [*facts_list(facts), "", *table(rows, COLUMNS)]
    first, last = 64, max(row.side for row in rows)
    if last <= first:
        return "\n".join(lines)
    lines += ["", f"Exponent of tokens from {first}x{first} to {last}x{last}:", ""]
    for name, (work, time) in growth(rows, first, last).items():
        lines.append(f"- {name}: multiplications {work:.2f}, time {time:.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.embedded:
        with torch.inference_mode():
            print(measure_embedded("a red apple", options.seed))
        return 0
    rows: list[Row] = []
    rate = 100.0
    with torch.inference_mode():
        for side in options.sides:
            print(f"{side}x{side} ...", file=sys.stderr, flush=True)
            shape = (side, options.heads, options.dim, options.seed)
            rows += measure(*shape, rate, options.seconds)
            dense = [row for row in rows if row.method == "FullAttn()" and not row.is_extrapolated]
            rate = dense[-1].gflop / dense[-1].seconds if dense else rate
    facts = {
        "device": device_name("cpu"),
        "shape": f"B=1, H={options.heads}, D={options.dim}, fp32, pink noise, seed {options.seed}",
        "timing": f"median of the calls within {BUDGET_S} s, at least three, or one that takes "
        f"{LONG_S:g} s; dense attention beyond {options.seconds:g} s extrapolated with the square "
        "of the tokens",
        "small sizes": "least_tokens=0; by default less than 1024 tokens run dense",
        "error of": f"|output - dense| / |dense| over {ROWS} rows",
        "versions": versions_line(),
    }
    print(as_markdown(rows, facts))
    if options.csv:
        write_rows(options.csv, rows, facts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="latent sides")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=64, help="channels of a head")
    parser.add_argument("--embedded", action="store_true", help="on the embedded model's tokens")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest call to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the table here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
