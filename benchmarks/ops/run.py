"""The kernel benchmark: our attention ops against every dense backend, on shapes of real models.

`diffaccel bench kernels` runs it. For each shape and dtype the
dense backends run against each other first. Then, density by density, the sparse ops run in turns
with the fastest of them. The visual queries attend visual keys and all text; dense means the same
queries over the same keys. No op gets a speed before it has passed the error rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffaccel.benchmarks.ops.competitors.base import Op, always
from diffaccel.benchmarks.ops.competitors.dense import DENSE_OPS
from diffaccel.benchmarks.ops.competitors.other_sparse import OTHER_SPARSE_OPS
from diffaccel.benchmarks.ops.competitors.own import OWN_OPS
from diffaccel.benchmarks.ops.problems import draw_problem
from diffaccel.benchmarks.ops.race import Rules, run_dense, run_sparse
from diffaccel.benchmarks.ops.report import Row
from diffaccel.benchmarks.ops.roofline import Ceilings, measure_ceilings
from diffaccel.benchmarks.ops.shapes import Shape
from diffaccel.benchmarks.ops.timing import Deadline
from diffaccel.benchmarks.rows import write_rows
from diffaccel.machine import device_name, versions_line
from diffaccel.progress import Timing

OPS: dict[str, Op] = DENSE_OPS | OWN_OPS | OTHER_SPARSE_OPS
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Choice:
    """What to measure, and how.

    Args:
        shapes: Token shapes, with the number of heads wanted.
        densities: Shares of the visual blocks, above 0 to 1.
        dtypes: Keys of `DTYPES`.
        block: Tokens per block.
        device: "cpu" or a CUDA device.
        ops: Keys of `OPS`.
        with_flex_on_cpu: Whether flex_attention is compiled on a CPU too.
        repetitions: Calls per op and problem, at most.
        row_seconds: Time budget per op and problem.
        time_limit: Seconds after which nothing more is begun; None for no limit.
        stated: Ceilings to assume instead of measuring them.
        seed: Of tensors and random lists.
    """

    shapes: tuple[Shape, ...]
    densities: tuple[float, ...]
    dtypes: tuple[str, ...]
    block: int
    device: str
    ops: tuple[str, ...]
    with_flex_on_cpu: bool = False
    repetitions: int = 50
    row_seconds: float = 2.0
    time_limit: float | None = None
    stated: Ceilings | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """All rows, and the facts that decide about their numbers."""

    rows: list[Row]
    facts: dict[str, str]


def ceilings_of(choice: Choice) -> dict[str, Ceilings]:
    """Measures the ceilings of each dtype, torch name to rates, unless they are stated."""
    device = torch.device(choice.device)
    return {
        str(dtype).removeprefix("torch."): choice.stated or measure_ceilings(dtype, device)
        for dtype in (DTYPES[name] for name in choice.dtypes)
    }


@torch.inference_mode()
def measure_kernels(
    choice: Choice, timing: Timing | None = None, csv_path: Path | None = None
) -> Result:
    """Measures everything that was chosen.

    Args:
        choice: What.
        timing: Where progress is drawn.
        csv_path: Rewritten whenever more rows are known, so that a stopped run leaves them.
    """
    rules = Rules(choice.row_seconds, choice.repetitions, Deadline(choice.time_limit))
    timing = timing or Timing()
    parts = 1 + len(choice.densities)
    labels = [f"{shape.name} {dtype}" for shape in choice.shapes for dtype in choice.dtypes]
    with timing.phases({"ceilings": 1} | dict.fromkeys(labels, parts)) as advance:
        ceilings = ceilings_of(choice)
        advance("ceilings")
        result = Result([], facts_of(choice, ceilings))
        for label, rows in _groups(choice, ceilings, rules):
            result.rows.extend(rows)
            if csv_path is not None:
                write_rows(csv_path, result.rows, result.facts)
            advance(label)
    return result


def _groups(
    choice: Choice, ceilings: dict[str, Ceilings], rules: Rules
) -> Iterator[tuple[str, list[Row]]]:
    """Yields the rows of one comparison after the other, with the name of its progress bar."""
    ops = [_allowed(name, choice) for name in choice.ops]
    dense = [op for op in ops if op.is_dense]
    sparse = [op for op in ops if not op.is_dense]
    for shape in choice.shapes:
        for name in choice.dtypes:
            dtype, label = DTYPES[name], f"{shape.name} {name}"
            limits = ceilings[str(dtype).removeprefix("torch.")]
            problem = draw_problem(shape, 1.0, choice.block, dtype, choice.device, choice.seed)
            rows, baseline = run_dense(problem, dense, limits, rules)
            yield label, rows
            for density in choice.densities:
                thinned = replace(problem, density=density)
                yield label, run_sparse(thinned, sparse, baseline, limits, rules)


def _allowed(name: str, choice: Choice) -> Op:
    if name == "flex" and choice.with_flex_on_cpu:
        return replace(OPS[name], reason_against=always)
    return OPS[name]


def facts_of(choice: Choice, ceilings: dict[str, Ceilings]) -> dict[str, str]:
    """Says what the numbers depend on."""
    facts = {
        "device": device_name(choice.device),
        "versions": versions_line(),
        "inputs": f"random, seed {choice.seed}; half of the variance of query and key is smooth "
        "over the grid",
        "timing": f"at most {choice.repetitions} calls or {choice.row_seconds:g} s per row, at "
        "least 3, in turns with the best dense backend; the call from Python included",
    }
    origin = "stated" if choice.stated else "measured"
    for dtype, limits in ceilings.items():
        facts[f"ceilings {dtype}"] = (
            f"{limits.tflops:.4g} TFLOP/s matrix product, {limits.gigabytes_per_second:.4g} GB/s "
            f"copy (read + write), {origin}"
        )
    return facts
