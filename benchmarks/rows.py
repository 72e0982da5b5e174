"""Rows of measurements: frozen dataclasses as CSV, where a re-run replaces its own, and Markdown.

A class of rows names the fields that say what was measured in `key`. Together with the device
and the versions, which stand among the facts beside each row, they identify a row.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

from diffaccel.files import replacing

Row = TypeVar("Row")
Column = str | Callable[[Any], str]
"""A format string that gets the row as `0`, such as "{0.seconds:.2f}", or a function of it."""

MACHINE = ("device", "versions")


def write_rows(path: Path, rows: Sequence[Any], facts: Mapping[str, str] | None = None) -> None:
    """Writes rows of one class to a CSV file, which is complete or as it was.

    Rows of the file with the key of a new row, and the same device and versions, are replaced;
    others stay in front.

    Args:
        path: The file; made where missing.
        rows: At least one.
        facts: What else decides about the numbers: device, versions, inputs.
    """
    facts = dict(facts or {})
    key = (*type(rows[0]).key, *MACHINE)
    fresh = [{name: _text(value) for name, value in asdict(row).items()} | facts for row in rows]
    replaced = {_key_of(line, key) for line in fresh}
    kept = [line for line in _lines(path) if _key_of(line, key) not in replaced]
    lines = [*kept, *fresh]
    with (
        replacing(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        names = dict.fromkeys(name for line in reversed(lines) for name in line)
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(lines)


def read_rows(path: Path, kind: type[Row]) -> tuple[list[Row], dict[str, str]]:
    """Reads what `write_rows` wrote.

    Returns:
        The rows, and the facts beside the last of them.
    """
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(cast(Any, kind))}
    rows, facts = [], {}
    for line in _lines(path):
        values = {name: _value(line.pop(name), type_) for name, type_ in types.items()}
        rows.append(kind(**values))
        facts = line
    return rows, facts


def facts_list(facts: Mapping[str, str]) -> list[str]:
    """Writes what decides about numbers as lines of Markdown."""
    return [f"- {name}: {value}" for name, value in facts.items()]


def table(rows: Iterable[Any], columns: Mapping[str, Column]) -> list[str]:
    """Writes rows as lines of a Markdown table.

    Args:
        rows: In this order.
        columns: Heading to what stands below it.
    """
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (
            column.format(row) if isinstance(column, str) else column(row)
            for column in columns.values()
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _lines(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key_of(line: Mapping[str, str], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(line.get(name, "") for name in key)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _value(text: str, type_: Any) -> Any:
    kinds = get_args(type_) or (type_,)
    if text == "" and NoneType in kinds:
        return None
    if bool in kinds:
        return text == "True"
    return kinds[0](text)
