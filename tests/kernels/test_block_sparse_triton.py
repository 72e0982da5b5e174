"""The Triton kernel without a GPU: interpreted on the CPU, and compiled for real targets."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# bytes that one thread may spill, stores and loads together: some outside the loops, some in the
# loop over centroids, which makes up 1 / block_k of the work
SPILL_BUDGET = {
    (80, 128, False): 64,
    (80, 128, True): 216,
    (90, 64, True): 40,
    (90, 128, True): 32,
    (100, 128, True): 92,
}
MATRIX_OP = {80: "matrix_ops", 90: "hopper_ops", 100: "blackwell_ops"}


def test_interpreted_kernel_matches_the_oracle(run_worker):
    run_worker("interpreter_worker.py", timeout=600, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(run_worker, tmp_path_factory):
    """Compiles bf16 kernels for each target and head dim in one process."""
    targets = [(capability, dim) for capability in SHARED_LIMIT for dim in (64, 128)]
    numbers = [number for target in targets for number in target]
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = run_worker("cross_compile_worker.py", *numbers, timeout=900, TRITON_CACHE_DIR=cache)
    rows = map(json.loads, lines.splitlines())
    return {(row["capability"], row["head_dim"], row["has_centroids"]): row for row in rows}


@pytest.mark.parametrize("has_centroids", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_compiled_kernel_fits_the_gpu(compiled, capability, head_dim, has_centroids):
    row = compiled[capability, head_dim, has_centroids]
    assert row["shared"] <= SHARED_LIMIT[capability], row
    assert row["spill_bytes"] <= SPILL_BUDGET.get((capability, head_dim, has_centroids), 0), row
    assert row[MATRIX_OP[capability]] > 0, row
