"""Results of the kernel benchmark: one row an op, as CSV and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from diffaccel.files import replacing

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


_TEXTS = {"op", "backend", "shape", "dtype", "status", "baseline"}
_WHOLE = {"tokens", "text", "heads", "head_dim", "block", "repetitions"}


def write_csv(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Writes all rows, the facts repeated in each; the file is complete or absent."""
    names = [field.name for field in fields(Row)]
    with (
        replacing(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [*names, *facts])
        writer.writeheader()
        for row in rows:
            known = {key: "" if value is None else value for key, value in asdict(row).items()}
            writer.writerow({**known, **facts})


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Reads what `write_csv` wrote."""
    names = [field.name for field in fields(Row)]
    rows, facts = [], {}
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            rows.append(Row(**{name: _parsed(name, line[name]) for name in names}))
            facts = {name: text for name, text in line.items() if name not in names}
    return rows, facts


def _parsed(name: str, text: str) -> str | int | float | None:
    if text == "":
        return None
    if name in _TEXTS:
        return text
    return int(text) if name in _WHOLE else float(text)


def as_markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """Writes the facts, then a table for each shape and dtype."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for (shape, dtype), found in groupby(rows, key=lambda row: (row.shape, row.dtype)):
        table = list(found)
        first = table[0]
        text = f" + {first.text} text" if first.text else ""
        lines += [
            "",
            f"### {shape}, {dtype}",
            "",
            f"{first.tokens} visual{text} tokens, {first.heads} heads, D={first.head_dim}, "
            f"blocks of {first.block}. Best dense: {_baseline(table)}.",
            "",
            *_table(row for row in table if not row.status.startswith("skipped")),
            *_not_run(row for row in table if row.status.startswith("skipped")),
        ]
    return "\n".join(lines)


_HEADINGS = (
    "op", "density", "kept", "p50 ms (p20 to p80)", "TFLOP/s", "of ceiling", "over floor",
    "speed-up", "order ms", "index ms", "speed-up in use", "error / limit", "extra MiB",
)  # fmt: skip


def _table(rows: Iterable[Row]) -> list[str]:
    lines = [f"| {' | '.join(_HEADINGS)} |", "|" + "---|" * len(_HEADINGS)]
    for row in rows:
        is_measured = row.status == MEASURED
        spread = f"{row.p50_ms:.4g} ({row.p20_ms:.4g} to {row.p80_ms:.4g})" if is_measured else ""
        error = "" if row.max_error is None else f"{row.max_error:.1e} / {row.error_limit:.1e}"
        over = row.p50_ms / row.floor_ms if is_measured and row.floor_ms else None
        cells = (
            row.label,
            f"{row.density:g}",
            _text(row.kept, ".3f"),
            spread or row.status,
            _text(row.tflops, ".4g"),
            _text(row.ceiling_share, ".0%"),
            _text(over, ".2f"),
            _text(row.speed_up, ".2f"),
            _text(row.order_ms, ".4g"),
            _text(row.index_ms, ".4g"),
            _text(row.speed_up_in_use, ".2f"),
            error,
            _text(row.extra_memory_mib, ".0f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _not_run(rows: Iterable[Row]) -> list[str]:
    """Names what has no line in the table, by reason."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        reason = row.status.removeprefix("skipped: ")
        reasons.setdefault(reason, {}).setdefault(row.label, []).append(f"{row.density:g}")
    lines = [""] if reasons else []
    for reason, labels in reasons.items():
        named = (f"{label} at {', '.join(found)}" for label, found in labels.items())
        lines.append(f"- Not run, {reason}: {'; '.join(named)}.")
    return lines


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _baseline(rows: Sequence[Row]) -> str:
    return next((row.baseline for row in rows if row.baseline), "none measured")
