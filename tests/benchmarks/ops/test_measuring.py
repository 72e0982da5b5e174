"""Percentiles, turns, work and floors: the arithmetic behind the numbers."""

import pytest
import torch

from diffaccel.benchmarks.ops.problems import draw_problem
from diffaccel.benchmarks.ops.roofline import (
    Ceilings,
    Work,
    attention_work,
    block_sparse_work,
    floor_of,
    kept_flops,
    measure_ceilings,
    roofline_table,
)
from diffaccel.benchmarks.ops.run import OPS
from diffaccel.benchmarks.ops.shapes import SHAPES, Shape
from diffaccel.benchmarks.ops.timing import (
    Deadline,
    Spread,
    interleave,
    planned_repetitions,
    takes_part,
)

CPU = torch.device("cpu")


def test_percentiles_interpolate_between_samples():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Spread(2.0, 3.5, 5.0, 6)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("first_ms", "seconds", "most", "expected"),
    [(10.0, 1.0, 50, 50), (100.0, 1.0, 50, 10), (5000.0, 1.0, 50, 3), (5000.0, 1.0, 2, 2)],
)
def test_repetitions_follow_the_budget(first_ms, seconds, most, expected):
    assert planned_repetitions(first_ms, seconds, most) == expected


@pytest.mark.parametrize(("count", "rounds"), [(0, 7), (1, 7), (3, 7), (7, 7), (2, 49)])
def test_turns_are_spread_evenly_and_none_is_lost(count, rounds):
    taken = [turn for turn in range(rounds) if takes_part(turn, count, rounds)]
    assert len(taken) == count
    gaps = [later - earlier for earlier, later in zip(taken, taken[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_contestants_take_turns_and_inputs_rotate():
    played = []
    contestants = {
        "a": [lambda: played.append("a0"), lambda: played.append("a1")],
        "b": [lambda: played.append("b0")],
    }
    samples = interleave(
        contestants, CPU, row_seconds=10.0, repetitions=4, deadline=Deadline(None)
    )
    assert played == ["a0", "b0", "a1", "b0"] * 2
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4}


def test_nothing_is_begun_after_the_deadline():
    def call():
        raise AssertionError("was called")

    samples = interleave(
        {"a": [call]}, CPU, row_seconds=1.0, repetitions=5, deadline=Deadline(0.0)
    )
    assert samples == {"a": []}


def test_kept_work_by_hand():
    assert kept_flops(pairs=10, dim=64) == 2560
    shape = Shape("s", (1, 4, 8), 8, 2, 16)
    # query, key, value, output of 32 tokens and key, value of 8; 2 heads, 16 channels, 2 bytes
    assert attention_work(shape, 100, itemsize=2) == Work(6400, (4 * 32 + 2 * 8) * 2 * 16 * 2)


def test_floor_by_hand():
    ceilings = Ceilings(tflops=2.0, gigabytes_per_second=100.0)
    floor = floor_of(Work(flops=4_000_000_000, bytes=50_000_000), ceilings)
    assert (floor.arithmetic_ms, floor.memory_ms) == (2.0, 0.5)
    assert (floor.ms, floor.bound) == (2.0, "arithmetic")
    floor = floor_of(Work(flops=400_000_000, bytes=50_000_000), ceilings)
    assert (floor.ms, floor.bound) == (0.5, "memory")


def test_dense_flux_4k_by_hand():
    shape = SHAPES["flux-4k"]
    work = attention_work(shape, shape.all_pairs, itemsize=2)
    assert work.flops == 4 * 24 * 65536 * 66048 * 128
    assert work.bytes == (4 * 65536 + 2 * 512) * 24 * 128 * 2


@pytest.mark.parametrize(
    ("name", "correction"),
    [
        ("block-random", "none"),
        ("block-rectified", "pooled"),
        ("block-random-centroids", "centroids"),
    ],
)
def test_roofline_counts_what_the_op_is_given(name, correction):
    shape = Shape("whole blocks", (1, 8, 16), 5, 2, 32)
    problem = draw_problem(shape, 0.5, 32, torch.float32, "cpu")
    prepared = OPS[name].prepare(problem, problem.sets[0])
    actual = attention_work(shape, prepared.kept_pairs, 4) + prepared.extra
    assert block_sparse_work(shape, 0.5, 32, 4, correction) == actual


def test_roofline_table_has_every_kernel_under_the_stated_ceilings():
    shape = Shape("s", (1, 8, 16), 0, 1, 64)
    table = roofline_table((shape,), (0.5,), 32, {"float32": Ceilings(1e-3, 1.0)})
    # dense: 4 * 128 * 128 * 64 FLOP at 1 GFLOP/s; 4 * 128 * 64 * 4 bytes at 1 GB/s
    assert "| s | float32 | dense | 1 | 0.004194 | 0.1311 | 4.194 | 0.1311 | 4.194 |" in table
    for kernel in ("estimate and select", "block-sparse, pooled", "neighborhood"):
        assert f"| {kernel} |" in table


@pytest.mark.slow
def test_ceilings_are_measured_within_reason():
    ceilings = measure_ceilings(torch.float32, CPU, seconds=0.01)
    assert 1e-3 < ceilings.tflops < 1e3
    assert 0.1 < ceilings.gigabytes_per_second < 1e4
