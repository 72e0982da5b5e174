"""Rows of measurements: what a re-run replaces, what it leaves, what comes back."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from diffaccel.benchmarks.ops.report import Row as KernelRow
from diffaccel.benchmarks.rows import facts_list, read_rows, table, write_rows
from diffaccel.benchmarks.studies.agent_growth import Row as GrowthRow
from diffaccel.benchmarks.studies.agent_unet import PictureRow, StepRow
from diffaccel.benchmarks.studies.high_resolution import Row as HighResolutionRow
from diffaccel.benchmarks.studies.window_density import Row as DensityRow

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FACTS = {"device": "cpu", "versions": "torch 2", "seed": "0"}


@dataclass(frozen=True, slots=True)
class Row:
    key = ("case", "method")

    case: int
    method: str
    seconds: float | None
    is_guess: bool = False


FIRST, SECOND = Row(1, "full", 1 / 3), Row(1, "sparse", None, True)


def test_what_is_written_comes_back(tmp_path):
    write_rows(tmp_path / "rows.csv", [FIRST, SECOND], FACTS)
    assert read_rows(tmp_path / "rows.csv", Row) == ([FIRST, SECOND], FACTS)


def test_a_re_run_replaces_its_own_rows_alone(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [FIRST, SECOND], FACTS)
    again = replace(FIRST, seconds=0.25)
    write_rows(path, [again], FACTS | {"seed": "1"})
    assert read_rows(path, Row)[0] == [SECOND, again]
    write_rows(path, [FIRST], FACTS | {"device": "cuda"})
    write_rows(path, [FIRST], FACTS | {"versions": "torch 3"})
    assert read_rows(path, Row)[0] == [SECOND, again, FIRST, FIRST]


def test_columns_that_came_later_are_empty_in_earlier_rows(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [FIRST], FACTS)
    write_rows(path, [SECOND], FACTS | {"threads": "2"})
    lines = list(csv.DictReader(path.open()))
    assert [line["threads"] for line in lines] == ["", "2"]
    assert list(lines[0]) == ["case", "method", "seconds", "is_guess", *FACTS, "threads"]


def test_tables():
    columns = {"of": "{0.case} {0.method}", "s": lambda row: f"{row.seconds:.2f}"}
    assert table([FIRST], columns) == ["| of | s |", "|---|---|", "| 1 full | 0.33 |"]
    assert facts_list({"seed": "0"}) == ["- seed: 0"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("agent-growth-cpu", GrowthRow),
        ("agent-unet-cpu", StepRow),
        ("agent-unet-cpu-quality", PictureRow),
        ("high-resolution-cpu", HighResolutionRow),
        ("high-resolution-clip-cpu", HighResolutionRow),
        ("high-resolution-clip-16x-cpu", HighResolutionRow),
        ("kernels-cpu-16k", KernelRow),
        ("window-density", DensityRow),
    ],
)
def test_committed_results_are_rows_of_today(name, kind, tmp_path):
    path = RESULTS / f"{name}.csv"
    rows, facts = read_rows(path, kind)
    assert len(rows) == len(path.read_text().splitlines()) - 1 >= 2
    keys = {tuple(getattr(row, field) for field in kind.key) for row in rows}
    assert len(keys) == len(rows)
    if name != "window-density":
        assert facts["device"].startswith("cpu") and "torch 2" in facts["versions"]
