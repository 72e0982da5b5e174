"""Measures the error of one attention call: every selector with every corrector, on real tensors.

Captures query, key and value while the embedded models draw (`captures.py`), adds synthetic heads,
and runs block-sparse attention on each with several shares of the blocks:

    python benchmarks/studies/block_sparse/layers.py --what reference --calls FOLDER --csv rows.csv

The folder of `--calls` has a file for each drawing, with a line per call, method and share. A run
that was stopped goes on from there; several may run at once on different `--drawings`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice, product
from math import exp, log
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from torch import Tensor

from diffaccel.benchmarks.rows import Column, read_rows, table, write_rows
from diffaccel.benchmarks.studies.block_sparse.captures import (
    DRAWINGS,
    Captured,
    captured,
)
from diffaccel.benchmarks.studies.block_sparse.contenders import (
    BLOCK,
    CONTENDERS,
    DEFAULT,
    Contender,
)
from diffaccel.benchmarks.studies.block_sparse.curves import (
    Point,
    error_at,
    mean_at,
    quantile_at,
)
from diffaccel.benchmarks.studies.block_sparse.synthetic import KINDS, synthetic
from diffaccel.machine import device_name, versions_line
from diffaccel.methods import FullAttn
from diffaccel.methods.base import Method

GROUPS = ("image", "video", "synthetic")
SEEDS = (0, 1)

Curves = dict[tuple[str, int, int], list[Point]]
"""Of each call, by source, step and layer."""


@dataclass(frozen=True, slots=True)
class CallRow:
    """One call with one method.

    `density` is the share of visual query-key pairs that was computed exactly, `error` is
    |output - dense| / |dense| over visual rows (Frobenius norms), `seconds` is CPU time.
    """

    key = ("group", "source", "step", "layer", "contender", "order", "block", "keep")

    group: str
    source: str
    step: int
    layer: int
    contender: str
    order: str
    block: int
    keep: float
    density: float
    error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """Means over calls at equal density and at equal total cost, None where it is not reached.

    `q90_*` are quantiles over calls, `added` is `added_cost`, and a total cost is the density and
    what is added. `ratio` is the geometric mean, over calls and knob values, of the error over
    that of `SparseAttn` in the same call, in raster order at equal density.
    """

    key = ("group", "contender", "order", "block")

    group: str
    contender: str
    order: str
    block: int
    calls: int
    at_05: float | None
    at_10: float | None
    at_15: float | None
    at_20: float | None
    at_30: float | None
    q90_10: float | None
    q90_20: float | None
    added: float
    cost_10: float | None
    cost_20: float | None
    least_density: float
    largest_density: float
    ratio: float | None


def errors(
    call: Captured, dense: Tensor, contender: Contender, group: str = "", keeps: Any = None
) -> Iterator[CallRow]:
    """Runs one contender on one call.

    Args:
        call: The call.
        dense: Dense attention of its visual rows, (B, N, H, D).
        contender: What runs.
        group: What the rows are reported with.
        keeps: Those of its knob values to run, all by default.
    """
    for keep in contender.keeps if keeps is None else keeps:
        started = process_time()
        output, density = attended(contender.method(keep), call)
        seconds = process_time() - started
        error = (output - dense).norm() / dense.norm()
        yield CallRow(
            group, call.source, call.step, call.layer, contender.name, contender.order,
            contender.block, keep, density, float(error), seconds,
        )  # fmt: skip


def attended(method: Method, call: Captured) -> tuple[Tensor, float]:
    """Runs a method: its visual rows fp32, and the share of visual pairs that it computed."""
    layout = call.layout
    output, density = method.attend_with_density(
        call.query, call.key, call.value, layout, scale=call.scale
    )
    visual, total = layout.visual.length**2, layout.length**2
    return (
        output[:, layout.visual_slice].float(),
        1.0 - (1.0 - float(density)) * total / visual,
    )


def calls_of(
    group: str, folder: Path, tunes: bool = False, wanted: str = ""
) -> Iterator[Captured]:
    """Yields the calls of a group: those that tune defaults, or the others, which are reported.

    Args:
        group: One of `GROUPS`.
        folder: Where captures are kept.
        tunes: Which part.
        wanted: What must stand in the label of a drawing.
    """
    if group == "synthetic":
        for kind, seed in product(KINDS, SEEDS):
            if wanted in kind:
                yield synthetic(kind, seed + 100 * tunes)
    for drawing in DRAWINGS:
        if drawing.group == group and drawing.tunes == tunes and wanted in drawing.label:
            yield from captured(drawing, folder)


def measure(
    calls: Iterable[Captured], contenders: Sequence[Contender], group: str, folder: Path, most: int
) -> None:
    """Runs contenders on calls, and adds to the files of a folder what is not there yet.

    Args:
        calls: The calls.
        contenders: What runs on each.
        group: What the rows are reported with.
        folder: A file for each source of calls.
        most: Knob values of each contender to run, from the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for call in calls:
        path = folder / f"{call.source}.csv"
        known = {_key(row) for row in read_rows(path, CallRow)[0]}
        dense: Tensor | None = None
        fresh: list[CallRow] = []
        for contender in contenders:
            where = (group, call.source, call.step, call.layer)
            what = (contender.name, contender.order, contender.block)
            missing = [
                keep for keep in contender.keeps[:most] if (*where, *what, keep) not in known
            ]
            if missing:
                dense = attended(FullAttn(), call)[0] if dense is None else dense
                fresh += errors(call, dense, contender, group, missing)
        if fresh:
            write_rows(path, fresh)
        print(f"{call.source} {call.step} {call.layer}: {len(fresh)}", file=sys.stderr, flush=True)


def summary(rows: Sequence[CallRow], contenders: Sequence[Contender]) -> list[Row]:
    """Reads equal densities and costs off the curves of all calls."""
    asked = {(each.name, each.order, each.block): each for each in contenders}
    curves: dict[tuple[str, str, str, int], Curves] = {}
    for row in rows:
        at = curves.setdefault((row.group, row.contender, row.order, row.block), {})
        call = (row.source, row.step, row.layer)
        at.setdefault(call, []).append((row.density, row.error))
    return [
        _row(
            group, asked[name, order, block], at, curves.get((group, DEFAULT, "raster", BLOCK), {})
        )
        for (group, name, order, block), at in curves.items()
        if (name, order, block) in asked
    ]  # fmt: skip


def _row(group: str, contender: Contender, at: Curves, default: Curves) -> Row:
    curves, added = list(at.values()), contender.added
    by_keep = zip(*(sorted(points) for points in curves), strict=False)
    means = [fmean(point[0] for point in points) for points in by_keep]
    return Row(
        group=group,
        contender=contender.name,
        order=contender.order,
        block=contender.block,
        calls=len(curves),
        at_05=mean_at(curves, 0.05),
        at_10=mean_at(curves, 0.10),
        at_15=mean_at(curves, 0.15),
        at_20=mean_at(curves, 0.20),
        at_30=mean_at(curves, 0.30),
        q90_10=quantile_at(curves, 0.10),
        q90_20=quantile_at(curves, 0.20),
        added=added,
        cost_10=mean_at(curves, 0.10 - added),
        cost_20=mean_at(curves, 0.20 - added),
        least_density=min(means),
        largest_density=max(means),
        ratio=_ratio(at, default),
    )


def _ratio(at: Curves, default: Curves) -> float | None:
    logs = []
    for call, points in at.items():
        for density, error in points:
            other = error_at(default.get(call, []), density)
            if other and error:
                logs.append(log(error / other))
    return exp(fmean(logs)) if logs else None


def _key(row: CallRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in row.key)


def _number(name: str) -> Column:
    return lambda row: "-" if getattr(row, name) is None else f"{getattr(row, name):.3f}"


COLUMNS: dict[str, Column] = {
    "group": "{0.group}",
    "method": "{0.contender}",
    "order": "{0.order}",
    "block": "{0.block}",
    "calls": "{0.calls}",
    **{
        field.name.replace("at_", ".").replace("cost_", "cost ."): _number(field.name)
        for field in fields(Row)
        if field.name.startswith(("at_", "q90_", "cost_", "added", "ratio"))
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Captures, measures, prints; returns the exit code."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    contenders = [each for name in options.what for each in CONTENDERS[name]()]
    with torch.inference_mode():
        for group in options.groups:
            calls = calls_of(group, options.captures, options.tuning, options.drawings)
            some = islice(calls, 0, None, options.every)
            measure(some, contenders, group, options.calls, options.points)
    found = [row for path in options.calls.glob("*.csv") for row in read_rows(path, CallRow)[0]]
    rows = summary([row for row in found if row.group in options.groups], contenders)
    print("\n".join(table(rows, COLUMNS)))
    if options.csv:
        facts = {"device": device_name("cpu"), "dtype": "float32", "versions": versions_line()}
        write_rows(options.csv, rows, facts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=tuple(CONTENDERS), default=["reference"])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--captures", type=Path, default=Path("captures"), help="kept here")
    parser.add_argument("--every", type=int, default=1, help="takes every n-th call")
    parser.add_argument("--points", type=int, default=4, help="knob values of each method")
    parser.add_argument("--drawings", default="", help="only those with this in their label")
    parser.add_argument("--tuning", action="store_true", help="the calls that defaults came from")
    parser.add_argument("--calls", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
