"""Results of the kernel benchmark: one row an op, and all of them as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from diffaccel.benchmarks.rows import Column, facts_list, table

MEASURED = "measured"
FAILED = "failed its error rule"


@dataclass(frozen=True, slots=True)
class Row:
    """One op on one problem. What was not measured is None.

    Args:
        op: What is computed.
        backend: Who computes it.
        shape: Name of the token shape.
        tokens: Visual tokens N.
        text: Text keys T.
        heads: H.
        head_dim: D.
        dtype: Such as "bfloat16".
        density: Share of the visual blocks, or of the window's volume, that was asked for.
        block: Tokens per block.
        status: "measured", or why there is no speed.
        kept: Share of the pairs that is computed exactly, text included.
        p20_ms: Of the op alone.
        p50_ms: Of the op alone.
        p80_ms: Of the op alone.
        repetitions: How many calls were timed.
        tflops: TFLOP/s over the operations of the kept pairs, 4 D each.
        ceiling_share: Share of the rate of a large matrix product in this dtype.
        floor_ms: max(FLOP / rate, bytes / bandwidth).
        baseline: The fastest dense backend of this shape and dtype.
        speed_up: Median of that baseline, timed in turns with this op, over the median of the op.
        order_ms: Median of putting tokens in block order and back.
        index_ms: Median of estimating, selecting and correcting.
        speed_up_in_use: As `speed_up`, with order and index counted.
        max_error: Against the fp64 oracle, on a small problem of the same kind (where the sample
            of the large one breaks the rule: there).
        error_limit: Twice the error of SDPA in the same dtype plus a rounding.
        extra_memory_mib: Memory that the call allocates beside its inputs (CUDA only).
    """

    key = ("op", "backend", "shape", "text", "heads", "head_dim", "dtype", "density", "block")

    op: str
    backend: str
    shape: str
    tokens: int
    text: int
    heads: int
    head_dim: int
    dtype: str
    density: float
    block: int
    status: str
    kept: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    repetitions: int | None = None
    tflops: float | None = None
    ceiling_share: float | None = None
    floor_ms: float | None = None
    baseline: str | None = None
    speed_up: float | None = None
    order_ms: float | None = None
    index_ms: float | None = None
    speed_up_in_use: float | None = None
    max_error: float | None = None
    error_limit: float | None = None
    extra_memory_mib: float | None = None

    @property
    def label(self) -> str:
        """Op and backend in one."""
        return f"{self.op} [{self.backend}]"


def as_markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """Writes the facts, then a table for each shape and dtype."""
    lines = facts_list(facts)
    for (shape, dtype), group in groupby(rows, key=lambda row: (row.shape, row.dtype)):
        found = list(group)
        first = found[0]
        text = f" + {first.text} text" if first.text else ""
        lines += [
            "",
            f"### {shape}, {dtype}",
            "",
            f"{first.tokens} visual{text} tokens, {first.heads} heads, D={first.head_dim}, "
            f"blocks of {first.block}. Best dense: {_baseline(found)}.",
            "",
            *table([row for row in found if not row.status.startswith("skipped")], _COLUMNS),
            *_not_run(row for row in found if row.status.startswith("skipped")),
        ]
    return "\n".join(lines)


def _shown(name: str, form: str) -> Callable[[Row], str]:
    """A cell that is empty where nothing was measured."""

    def cell(row: Row) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return cell


def _spread(row: Row) -> str:
    if row.p50_ms is None:
        return row.status
    return f"{row.p50_ms:.4g} ({row.p20_ms:.4g} to {row.p80_ms:.4g})"


def _over_floor(row: Row) -> str:
    return f"{row.p50_ms / row.floor_ms:.2f}" if row.p50_ms and row.floor_ms else ""


def _error(row: Row) -> str:
    return "" if row.max_error is None else f"{row.max_error:.1e} / {row.error_limit:.1e}"


_COLUMNS: dict[str, Column] = {
    "op": "{0.label}",
    "density": "{0.density:g}",
    "kept": _shown("kept", ".3f"),
    "p50 ms (p20 to p80)": _spread,
    "TFLOP/s": _shown("tflops", ".4g"),
    "of ceiling": _shown("ceiling_share", ".0%"),
    "over floor": _over_floor,
    "speed-up": _shown("speed_up", ".2f"),
    "order ms": _shown("order_ms", ".4g"),
    "index ms": _shown("index_ms", ".4g"),
    "speed-up in use": _shown("speed_up_in_use", ".2f"),
    "error / limit": _error,
    "extra MiB": _shown("extra_memory_mib", ".0f"),
}


def _not_run(rows: Iterable[Row]) -> list[str]:
    """Names what has no line in the table, by reason."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        reason = row.status.removeprefix("skipped: ")
        reasons.setdefault(reason, {}).setdefault(row.label, []).append(f"{row.density:g}")
    lines = [""] if reasons else []
    for reason, labels in reasons.items():
        named = (f"{label} at {', '.join(places)}" for label, places in labels.items())
        lines.append(f"- Not run, {reason}: {'; '.join(named)}.")
    return lines


def _baseline(rows: Sequence[Row]) -> str:
    return next((row.baseline for row in rows if row.baseline), "none measured")
