"""The gate and the rows: no op has a speed that it did not earn."""

from dataclasses import fields, replace

import pytest
import torch

from diffaccel.benchmarks.ops.competitors.own import OWN_OPS
from diffaccel.benchmarks.ops.error_rule import (
    ROUNDING,
    WITHOUT_TWIN,
    Verdict,
    error_limit,
    judge,
)
from diffaccel.benchmarks.ops.problems import draw_problem
from diffaccel.benchmarks.ops.race import Baseline, Rules, run_dense, run_sparse
from diffaccel.benchmarks.ops.report import FAILED, MEASURED, Row, as_markdown
from diffaccel.benchmarks.ops.roofline import Ceilings
from diffaccel.benchmarks.ops.run import OPS, Choice, measure_kernels
from diffaccel.benchmarks.ops.shapes import Shape
from diffaccel.benchmarks.ops.timing import Deadline
from diffaccel.benchmarks.rows import read_rows, write_rows

SHAPE = Shape("tiny", (1, 9, 13), 5, 2, 32)
CEILINGS = Ceilings(1.0, 10.0)
SPEEDS = (
    "p20_ms", "p50_ms", "p80_ms", "repetitions", "tflops", "ceiling_share", "speed_up",
    "speed_up_in_use", "order_ms", "index_ms",
)  # fmt: skip


def rules(seconds=None):
    return Rules(row_seconds=0.001, repetitions=3, deadline=Deadline(seconds))


def problem(density=0.5, dtype=torch.float32):
    return draw_problem(SHAPE, density, 32, dtype, "cpu")


def spoiled(name, spoil):
    """The op with its output changed."""

    def prepare(problem, inputs):
        prepared = OPS[name].prepare(problem, inputs)
        return replace(prepared, run=lambda: spoil(prepared.run()))

    return replace(OPS[name], prepare=prepare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sdpa-flash", *OWN_OPS])
def test_right_outputs_pass(name, dtype):
    given = problem(dtype=dtype)
    prepared = OPS[name].prepare(given, given.sets[0])
    verdict = judge(prepared.run(), prepared.expected)
    assert verdict.passed, verdict
    # SDPA is off too, but not by much: else anything would pass
    assert ROUNDING[dtype] < verdict.limit < 2 * WITHOUT_TWIN[dtype]


def test_the_limit_by_hand():
    assert error_limit(torch.float16, 1e-3) == pytest.approx(2.5e-3)
    assert error_limit(torch.bfloat16) == 2e-2


@pytest.mark.parametrize("name", ["sdpa-flash", *OWN_OPS])
@pytest.mark.parametrize("most_rows", [None, 9])
def test_a_wrong_last_row_is_seen(name, most_rows):
    given = problem()
    prepared = OPS[name].prepare(given, given.sets[0])
    output = prepared.run().clone()
    output[:, -1, -1, -1] += 1e-3
    assert not judge(output, prepared.expected, most_rows).passed


def test_the_correction_is_part_of_what_is_expected():
    """The uncorrected output of the same lists must not pass for the corrected one."""
    given = problem()
    plain, corrected = (
        OPS[name].prepare(given, given.sets[0])
        for name in ("block-random", "block-random-centroids")
    )
    assert torch.equal(plain.expected.plan.indices, corrected.expected.plan.indices)
    assert not judge(plain.run(), corrected.expected).passed


def test_nan_never_passes():
    assert not Verdict(float("nan"), 1.0).passed
    given = problem()
    prepared = OPS["block-random"].prepare(given, given.sets[0])
    assert not judge(torch.full_like(prepared.run(), torch.nan), prepared.expected).passed


def is_small(output):
    return output.shape[1] == 486  # the visual tokens of the gate's own problem


@pytest.mark.parametrize(
    "spoil",
    [
        lambda output: output * 1.01,
        lambda output: output * torch.nan,
        lambda output: output if is_small(output) else output * 1.01,
    ],
    ids=["scaled", "nan", "right on the small problem only"],
)
@pytest.mark.slow
def test_a_wrong_op_has_no_speed(spoil):
    ops = [spoiled("block-random", spoil), OPS["neighborhood"]]
    wrong, right = run_sparse(problem(), ops, None, CEILINGS, rules())
    assert wrong.status == FAILED
    assert not wrong.max_error <= wrong.error_limit
    assert [getattr(wrong, name) for name in SPEEDS] == [None] * len(SPEEDS)
    assert right.status == MEASURED and right.p50_ms > 0
    line = next(x for x in as_markdown([wrong, right], {}).splitlines() if wrong.label in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == FAILED and set(cells[4:11]) == {""}


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math"])
def test_the_named_sdpa_backend_is_the_one_that_runs(name):
    given = problem()
    prepared = OPS[name].prepare(given, given.sets[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        prepared.run()
    called = {event.key for event in profile.key_averages()}
    assert any("flash_attention" in key for key in called) == (name == "sdpa-flash")
    assert any("attention_math" in key for key in called) == (name == "sdpa-math")


def test_a_wrong_dense_backend_is_no_baseline():
    def fast_and_wrong(output):
        return torch.zeros_like(output)

    ops = [replace(spoiled("sdpa-flash", fast_and_wrong), backend="cheat"), OPS["sdpa-math"]]
    rows, baseline = run_dense(problem(), ops, CEILINGS, rules())
    assert [row.status for row in rows] == [FAILED, MEASURED]
    assert baseline.name == "sdpa-math"


@pytest.mark.slow
def test_an_op_that_raises_leaves_the_others():
    def explode(_problem, _inputs):
        raise ValueError("needs a larger moon\nand more")

    ops = [replace(OPS["block-random"], prepare=explode, backend="x"), OPS["block-random"]]
    broken, fine = run_sparse(problem(), ops, None, CEILINGS, rules())
    assert broken.status == "failed: ValueError: needs a larger moon"
    assert fine.status == MEASURED


def test_rows_after_the_time_limit_say_so():
    (row,) = run_sparse(problem(), [OPS["block-random"]], None, CEILINGS, rules(0.0))
    assert row.status == "skipped: the time limit of 0 s was reached"
    assert "Not run, the time limit of 0 s was reached" in as_markdown([row], {})


@pytest.mark.slow
def test_rows_are_complete_and_consistent():
    baseline = Baseline("sleepy", (lambda: torch.ones(300, 300) @ torch.ones(300, 300),))
    (row,) = run_sparse(problem(), [OPS["block-rectified"]], baseline, CEILINGS, rules())
    missing = {field.name for field in fields(Row) if getattr(row, field.name) is None}
    assert missing == {"extra_memory_mib"}  # not known on a CPU
    # 2 of 4 blocks for each of 2 heads, at least the ragged one among them
    assert 0.4 < row.kept < 0.6
    pairs = row.kept * 2 * 117 * (117 + 5)
    assert row.tflops == pytest.approx(4 * pairs * 32 / (row.p50_ms * 1e-3) / 1e12)
    assert row.ceiling_share == pytest.approx(row.tflops / CEILINGS.tflops)
    assert row.p20_ms <= row.p50_ms <= row.p80_ms
    dense_ms = row.speed_up * row.p50_ms
    in_use = row.p50_ms + row.order_ms + row.index_ms
    assert row.speed_up_in_use == pytest.approx(dense_ms / in_use)


@pytest.mark.slow
def test_csv_round_trip(tmp_path):
    choice = Choice(
        shapes=(SHAPE,),
        densities=(0.25, 1.0),
        dtypes=("fp32",),
        block=32,
        device="cpu",
        ops=("sdpa-flash", "sdpa-cudnn", "block-random", "natten"),
        repetitions=3,
        row_seconds=0.001,
        stated=CEILINGS,
    )
    path = tmp_path / "rows.csv"
    result = measure_kernels(choice, csv_path=path)
    assert [row.density for row in result.rows] == [1.0, 1.0, 0.25, 0.25, 1.0, 1.0]
    statuses = [row.status.split(":")[0] for row in result.rows]
    assert statuses == [MEASURED, "skipped"] * 3
    assert {row.baseline for row in result.rows if row.status == MEASURED} == {"sdpa-flash"}
    assert "1 TFLOP/s" in result.facts["ceilings float32"]
    assert read_rows(path, Row) == (result.rows, result.facts)
    again = tmp_path / "again.csv"
    write_rows(again, *read_rows(path, Row))
    assert again.read_text() == path.read_text()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["again.csv", "rows.csv"]
