"""Of the kernel tests: random problems, and the workers beside this file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SUPPORT = FOLDER.parent / "support"


@pytest.fixture(scope="session")
def problems():
    """The module of random problems."""
    import kernel_problems

    return kernel_problems


@pytest.fixture(scope="session")
def run_worker():
    """Runs a script of this folder in its own process and returns what it prints."""

    def run(script, *arguments, timeout, **variables):
        # 3.10 changes the default of this variable, and 3.9 warns unless it is set
        environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONSAFEPATH": ""}
        environment.pop("TRITON_INTERPRET", None)
        environment["PYTHONPATH"] = str(SUPPORT)
        command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
        result = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=timeout
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run
