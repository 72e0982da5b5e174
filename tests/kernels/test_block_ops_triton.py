"""The kernels of block statistics and selection without a GPU: interpreted, and compiled."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
LAUNCHES = [("statistics", 128), ("selection", 256), ("selection", 4096)]
TARGETS = [(op, capability, size) for op, size in LAUNCHES for capability in SHARED_LIMIT]


@pytest.mark.slow
def test_interpreted_kernels_match_the_oracle(run_worker):
    run_worker("block_ops_worker.py", timeout=900, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(run_worker, tmp_path_factory):
    """Compiles every target in one process."""
    words = [word for target in TARGETS for word in target]
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = run_worker("block_ops_compile_worker.py", *words, timeout=900, TRITON_CACHE_DIR=cache)
    rows = map(json.loads, lines.splitlines())
    return {(row["op"], row["capability"], row["size"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiled_kernel_fits_the_gpu(compiled, target):
    row = compiled[target]
    assert row["shared"] <= SHARED_LIMIT[target[1]], row
    assert row["spill_bytes"] == 0, row
