"""Runs the ops of one shape and dtype against each other: gate first, then the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diffaccel.benchmarks.ops.competitors.base import Op, Prepared
from diffaccel.benchmarks.ops.error_rule import SAMPLED_ROWS, Verdict, judge
from diffaccel.benchmarks.ops.problems import Problem, draw_problem
from diffaccel.benchmarks.ops.report import FAILED, MEASURED, Row
from diffaccel.benchmarks.ops.roofline import Ceilings, attention_work, floor_of, kept_flops
from diffaccel.benchmarks.ops.shapes import gate_shape
from diffaccel.benchmarks.ops.timing import Deadline, Spread, interleave

_BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Rules:
    """How long and how often is measured.

    Args:
        row_seconds: Time budget of one op on one problem.
        repetitions: At most so many calls for each.
        deadline: After it nothing is begun; the rows that are missing say so.
    """

    row_seconds: float
    repetitions: int
    deadline: Deadline


@dataclass(slots=True, eq=False)
class Entry:
    """An op that may run: prepared on every set, judged, not yet timed."""

    op: Op
    problem: Problem
    row: Row
    prepared: Sequence[Prepared] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The fastest dense backend on one problem."""

    name: str
    calls: tuple[Callable[[], object], ...]


def run_dense(
    problem: Problem, ops: Sequence[Op], ceilings: Ceilings, rules: Rules
) -> tuple[list[Row], Baseline | None]:
    """Times the dense backends against each other and names the fastest."""
    entries = [_enter(op, replace(problem, density=1.0), rules) for op in ops]
    samples = _time(entries, None, problem, rules)
    medians = {name: Spread.of(found).p50_ms for name, found in samples.items() if found}
    if not medians:
        return [_finished(entry, samples, None, ceilings, rules) for entry in entries], None
    name = min(medians, key=medians.__getitem__)
    calls = next(e for e in entries if e.op.label == name)
    baseline = Baseline(calls.op.backend, tuple(p.run for p in calls.prepared))
    samples[_BASELINE] = samples[name]
    return [_finished(e, samples, baseline, ceilings, rules) for e in entries], baseline


def run_sparse(
    problem: Problem,
    ops: Sequence[Op],
    baseline: Baseline | None,
    ceilings: Ceilings,
    rules: Rules,
) -> list[Row]:
    """Times the sparse ops at one density, in turns with the best dense backend."""
    entries = [_enter(op, problem, rules) for op in ops]
    samples = _time(entries, baseline, problem, rules)
    return [_finished(entry, samples, baseline, ceilings, rules) for entry in entries]


def gate(op: Op, problem: Problem) -> Verdict:
    """Judges an op on a small problem of the same dtype, head dim, density and kind."""
    small = draw_problem(
        gate_shape(problem.shape), problem.density, problem.block, problem.dtype,
        str(problem.device), problem.seed + 1000,
    )  # fmt: skip
    prepared = op.prepare(small, small.sets[0])
    return judge(prepared.run(), prepared.expected)


def _enter(op: Op, problem: Problem, rules: Rules) -> Entry:
    """Asks whether the op can run, and judges it twice: on a small problem and on this one."""
    shape = problem.shape
    entry = Entry(
        op,
        problem,
        Row(
            op.name, op.backend, shape.name, shape.visual, shape.text, shape.heads, shape.dim,
            str(problem.dtype).removeprefix("torch."), problem.density, problem.block, MEASURED,
        ),
    )  # fmt: skip
    reason = op.reason_against(problem)
    if reason:
        return _stopped(entry, f"skipped: {reason}")
    if rules.deadline.passed:
        return _stopped(entry, _too_late(rules))
    try:
        _judge(entry, problem)
    except torch.OutOfMemoryError:
        _stopped(entry, "skipped: out of memory")
    # Any failure of one op must leave the rows of the others; it is shown in place of the speed.
    except Exception as error:
        lines = str(error).splitlines() or [""]
        _stopped(entry, f"failed: {type(error).__name__}: {lines[0][:120]}")
    return entry


def _judge(entry: Entry, problem: Problem) -> None:
    verdict = gate(entry.op, problem)
    if verdict.passed:
        prepared = [entry.op.prepare(problem, inputs) for inputs in problem.sets]
        output, extra_memory = _call_for_memory(prepared[0], problem.device)
        _warm_up(prepared)
        sampled = judge(output, prepared[0].expected, SAMPLED_ROWS)
        entry.prepared = prepared
        entry.row = replace(entry.row, extra_memory_mib=extra_memory)
        verdict = verdict if sampled.passed else sampled
    entry.row = replace(entry.row, max_error=verdict.error, error_limit=verdict.limit)
    if not verdict.passed:
        _stopped(entry, FAILED)


def _call_for_memory(
    prepared: Prepared, device: torch.device
) -> tuple[torch.Tensor, float | None]:
    """Makes one call; returns its output and, on CUDA, the memory that it took in MiB."""
    output = prepared.run()  # compiles, which takes memory once
    if device.type != "cuda":
        return output, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = prepared.run()
    torch.cuda.synchronize(device)
    return output, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _warm_up(prepared: Sequence[Prepared]) -> None:
    """Calls once whatever will be timed and has not been called."""
    for other in prepared[1:]:
        other.run()
    for one in prepared:
        for step in (one.index, one.order):
            if step is not None:
                step()


def _stopped(entry: Entry, status: str) -> Entry:
    """Takes the op out of the race."""
    entry.prepared = ()
    entry.row = replace(entry.row, status=status, extra_memory_mib=None)
    return entry


def _too_late(rules: Rules) -> str:
    return f"skipped: the time limit of {rules.deadline.seconds:g} s was reached"


def _time(
    entries: Sequence[Entry], baseline: Baseline | None, problem: Problem, rules: Rules
) -> dict[str, list[float]]:
    contestants: dict[str, Sequence[Callable[[], object]]] = {}
    if baseline is not None:
        contestants[_BASELINE] = baseline.calls
    for entry in entries:
        if not entry.prepared:
            continue
        label = entry.op.label
        contestants[label] = [p.run for p in entry.prepared]
        for step in ("index", "order"):
            calls = [getattr(p, step) for p in entry.prepared]
            if calls[0] is not None:
                contestants[f"{label} {step}"] = calls
    return interleave(
        contestants,
        problem.device,
        row_seconds=rules.row_seconds,
        repetitions=rules.repetitions,
        deadline=rules.deadline,
    )


def _finished(
    entry: Entry,
    samples: Mapping[str, list[float]],
    baseline: Baseline | None,
    ceilings: Ceilings,
    rules: Rules,
) -> Row:
    """Turns samples into the row."""
    row, label = entry.row, entry.op.label
    if not entry.prepared:
        return row
    if not samples.get(label):
        return replace(row, status=_too_late(rules), extra_memory_mib=None)
    spread = Spread.of(samples[label])
    prepared, shape = entry.prepared[0], entry.problem.shape
    itemsize = entry.problem.dtype.itemsize
    work = attention_work(shape, prepared.kept_pairs, itemsize) + prepared.extra
    rate = kept_flops(prepared.kept_pairs, row.head_dim) / spread.p50_ms / 1e9
    row = replace(
        row,
        p20_ms=spread.p20_ms,
        p50_ms=spread.p50_ms,
        p80_ms=spread.p80_ms,
        repetitions=spread.repetitions,
        kept=prepared.kept_pairs / shape.all_pairs,
        tflops=rate,
        ceiling_share=rate / ceilings.tflops,
        floor_ms=floor_of(work, ceilings).ms,
        order_ms=_median(samples.get(f"{label} order")),
        index_ms=_median(samples.get(f"{label} index")),
    )
    dense_ms = _median(samples.get(_BASELINE))
    if baseline is None or dense_ms is None:
        return row
    in_use = spread.p50_ms + (row.order_ms or 0.0) + (row.index_ms or 0.0)
    is_complete = all(
        getattr(prepared, step) is None or getattr(row, f"{step}_ms") is not None
        for step in ("order", "index")
    )
    return replace(
        row,
        baseline=baseline.name,
        speed_up=dense_ms / spread.p50_ms,
        speed_up_in_use=dense_ms / in_use if is_complete else None,
    )


def _median(samples: list[float] | None) -> float | None:
    return Spread.of(samples).p50_ms if samples else None
