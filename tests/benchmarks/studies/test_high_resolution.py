"""The comparison above native size: one real picture, its measures, table and caption."""

import csv
from dataclasses import replace

import pytest

from diffaccel.benchmarks.rows import table, write_rows
from diffaccel.benchmarks.studies.high_resolution import (
    COLUMNS,
    LARGEST_FACTOR,
    VARIANTS,
    Job,
    Row,
    caption,
    draw,
    enlarged,
    main,
    measured,
)

JOB = Job(
    model="", prompt="a red apple on a blue background", variant="native", factor=1, seed=0,
    steps=2, refine_steps=1, frames=0, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    native = draw(JOB)
    jobs = [replace(JOB, variant=variant, factor=2) for variant in ("window", "recipe", "direct")]
    return native, [measured(job, draw(job), native.frames) for job in jobs]


@pytest.mark.slow
def test_variants_differ_in_what_they_attend(rows):
    native, (window, recipe, direct) = rows
    assert native.frames.shape == (1, 256, 256, 3) and native.density == 1.0
    assert {row.size for row in (window, recipe, direct)} == {"512x512"}
    assert window.density == recipe.density < 0.4 and direct.density == 1.0
    assert window.edge_sharpness != recipe.edge_sharpness
    for row in (window, recipe, direct):
        assert 0.0 <= row.repetition <= 1.0 and row.seconds > 0 and row.peak_memory_gb > 0.1


@pytest.mark.slow
def test_a_mere_enlargement_is_half_as_sharp(rows):
    native, _ = rows
    larger = enlarged(native.frames, 2)
    drawn = replace(native, frames=larger)
    row = measured(replace(JOB, factor=2), drawn, native.frames)
    assert larger.shape == (1, 512, 512, 3) and row.edge_sharpness < 0.75


@pytest.mark.slow
def test_tables_and_captions(rows, tmp_path):
    _, found = rows
    write_rows(tmp_path / "sheet.csv", found, {"seed": "0"})
    with (tmp_path / "sheet.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [*Row.__annotations__, "seed"]
    assert [row["variant"] for row in read] == ["window", "recipe", "direct"]
    assert "".join(table(found, COLUMNS)).count("512x512") == 3
    assert caption(found[0]).startswith("repetition ")


def test_dense_attention_stops_where_it_would_take_hours():
    assert [LARGEST_FACTOR[variant] for variant in VARIANTS] == [64, 4, 64, 64]
    with pytest.raises(SystemExit):
        main(["--variants", "magic"])
