"""The kernels of block statistics and selection without a GPU: interpreted, and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

FOLDER = Path(__file__).parent
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
LAUNCHES = [("statistics", 128), ("selection", 256), ("selection", 4096)]
TARGETS = [(op, capability, size) for op, size in LAUNCHES for capability in SHARED_LIMIT]


def _run(script, *arguments, timeout, **variables):
    # 3.10 changes the default of this variable, and 3.9 warns unless it is set
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONSAFEPATH": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    result = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_interpreted_kernels_match_the_oracle():
    _run("block_ops_worker.py", timeout=900, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles every target in one process."""
    words = [word for target in TARGETS for word in target]
    cache = str(tmp_path_factory.mktemp("triton"))
    lines = _run("block_ops_compile_worker.py", *words, timeout=900, TRITON_CACHE_DIR=cache)
    rows = map(json.loads, lines.splitlines())
    return {(row["op"], row["capability"], row["size"]): row for row in rows}


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiled_kernel_fits_the_gpu(compiled, target):
    row = compiled[target]
    assert row["shared"] <= SHARED_LIMIT[target[1]], row
    assert row["spill_bytes"] == 0, row
