"""The Triton kernel without a GPU: interpreted on the CPU, and compiled for real targets."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# bytes that one thread may spill in (capability, head dim, with centroids, by copy engine), stores
# and loads together: some outside the loops, some in the loop over centroids, which makes up
# 1 / block_k of the work
SPILL_BUDGET = {
    (80, 128, False, False): 64,
    (80, 128, True, False): 216,
    (89, 64, True, False): 44,
    (89, 128, True, False): 112,
    (90, 64, True, False): 40,
    (90, 64, True, True): 56,
    (90, 128, True, False): 32,
    (90, 128, True, True): 64,
    (100, 128, True, False): 92,
    (100, 128, True, True): 72,
}
MATRIX_OP = {80: "matrix_ops", 89: "matrix_ops", 90: "hopper_ops", 100: "blackwell_ops"}
HEAD_DIMS = (64, 128)


@pytest.mark.slow
def test_interpreted_kernel_matches_the_oracle(run_worker):
    run_worker("interpreter_worker.py", timeout=600, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(run_worker, tmp_path_factory):
    """Compiles bf16 kernels for each target and head dim in one process."""
    targets = [(capability, dim) for capability in SHARED_LIMIT for dim in HEAD_DIMS]
    numbers = [number for target in targets for number in target]
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = run_worker("cross_compile_worker.py", *numbers, timeout=900, TRITON_CACHE_DIR=cache)
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_compiled_kernels_fit_the_gpu(compiled, capability, head_dim):
    rows = [r for r in compiled if (r["capability"], r["head_dim"]) == (capability, head_dim)]
    loads = [False, True] if capability >= 90 else [False]
    expected = [(tma, centroids) for tma in loads for centroids in (False, True)]
    assert [(row["tma"], row["has_centroids"]) for row in rows] == expected
    for row in rows:
        variant = capability, head_dim, row["has_centroids"], row["tma"]
        budget = SPILL_BUDGET.get(variant, 0)
        assert row["shared"] <= SHARED_LIMIT[capability], row
        assert row["spill_bytes"] <= budget, row
        assert row[MATRIX_OP[capability]] > 0, row
        assert (row["copy_engine_ops"] > 0) == row["tma"], row
