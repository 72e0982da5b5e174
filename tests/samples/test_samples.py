"""Every short script in samples/ runs as its docstring says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "samples"
SAYS = {
    "one_line": "RectifiedSpaAttn",
    "high_resolution": "visual 1x48x48",
    "video": "visual 5x16x16",
    "guidance": "10 of 10 steps",
    "own_method": "ThinnedAttn",
    "own_model": "PatchDenoiser: RectifiedSpaAttn",
    "without_diffusers": "centroids: 27% of all pairs",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_sample_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(min(Image.open(path).size) >= 256 for path in pictures)
    assert SAYS[script.stem] in done.stdout


def test_the_gallery_lists_every_script_and_its_pictures_exist():
    gallery = (SAMPLES / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([\w./]+)\)", gallery))
    assert {path.name for path in SAMPLES.glob("*.py")} <= links
    assert all((SAMPLES / link).exists() for link in links)
