"""Python that runs in a clone's root sees the source folders first: nothing may break."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNINSTALLED = (
    "import sys; sys.meta_path = [m for m in sys.meta_path if 'editable' not in str(m)]; "
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "from diffusers import FluxPipeline; import diffaccel",
        "import diffaccel; from diffusers import FluxPipeline",
        UNINSTALLED + "import diffaccel.kernels, diffaccel.pipelines.image.generate",
    ],
    ids=["diffusers first", "diffaccel first", "not installed"],
)
def test_imports_work(code):
    environment = os.environ | {"PYTHONSAFEPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
