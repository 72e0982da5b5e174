"""Writes rows of measurements as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffaccel.files import replacing


def write_rows(path: Path, rows: Sequence[Any], facts: Mapping[str, str] | None = None) -> None:
    """Writes dataclass instances of one class, with the same facts beside each.

    Args:
        path: The file, which is complete or absent.
        rows: At least one.
        facts: What decides about the numbers: device, versions, inputs.
    """
    with (
        replacing(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [*asdict(rows[0]), *(facts or {})])
        writer.writeheader()
        for row in rows:
            values = {
                k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()
            }
            writer.writerow(values | dict(facts or {}))
