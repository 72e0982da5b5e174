"""The neighborhood kernel without a GPU: interpreted on the CPU, and compiled for real targets."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

TARGETS = [(80, 64), (80, 128), (89, 128), (90, 64), (90, 128), (100, 64), (100, 128)]
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# bytes that one thread may spill, stores and loads together: coordinates, outside of sm_90 on
SPILL_BUDGET = {(80, 128): 240, (89, 128): 52}
MATRIX_OP = {80: "matrix_ops", 89: "matrix_ops", 90: "hopper_ops", 100: "blackwell_ops"}


@pytest.mark.slow
def test_interpreted_kernel_matches_the_oracle(run_worker):
    run_worker("neighborhood_worker.py", timeout=600, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(run_worker, tmp_path_factory):
    """Compiles bf16 kernels for each target and head dim in one process."""
    numbers = [number for target in TARGETS for number in target]
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = run_worker(
        "neighborhood_compile_worker.py", *numbers, timeout=900, TRITON_CACHE_DIR=cache
    )
    rows = map(json.loads, lines.splitlines())
    return {(row["capability"], row["head_dim"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiled_kernel_fits_the_gpu(compiled, target):
    row = compiled[target]
    assert row["shared"] <= SHARED_LIMIT[target[0]], row
    assert row["spill_bytes"] <= SPILL_BUDGET.get(target, 0), row
    assert row[MATRIX_OP[target[0]]] > 0, row
