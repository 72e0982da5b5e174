"""The wheel holds one top-level package and everything that package needs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "pipelines" / "embedded"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Builds the wheel as pip does, from a copy because building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted)
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run([sys.executable, *command], check=True, cwd=folder, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.slow
def test_every_path_is_inside_the_package(wheel):
    tops = {name.split("/")[0].split("-")[0] for name in wheel.namelist()}
    assert tops == {"diffaccel"}


@pytest.mark.parametrize(
    "path",
    [
        "diffaccel/py.typed",
        "diffaccel/cli/__init__.py",
        "diffaccel/cli/sample.py",
        "diffaccel/bindings/__init__.py",
        "diffaccel/methods/__init__.py",
        "diffaccel/kernels/reference/__init__.py",
        "diffaccel/pipelines/image/__init__.py",
        "diffaccel/pipelines/embedded/image/model_index.json",
        "diffaccel/pipelines/embedded/image/transformer/diffusion_pytorch_model.safetensors",
        "diffaccel/pipelines/embedded/image/README.md",
        "diffaccel/benchmarks/__init__.py",
    ],
)
def test_wheel_holds(wheel, path):
    assert path in wheel.namelist()


def test_every_python_module_of_the_checkout_is_in_the_wheel(wheel):
    """A new sub-package that is not listed in pyproject.toml would be left out silently."""
    mapped = {"diffaccel": "diffaccel"} | {
        name: f"diffaccel/{name}" for name in ("kernels", "pipelines", "benchmarks")
    }
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in mapped.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected <= set(wheel.namelist())


@pytest.mark.parametrize("models", [("video",), ("unet", "scorer")])
def test_other_embedded_models_are_in_the_wheel_and_small(wheel, models):
    files = [p for model in models for p in (EMBEDDED / model).rglob("*") if p.is_file()]
    inside = {f"diffaccel/{path.relative_to(ROOT).as_posix()}" for path in files}
    cards = {f"diffaccel/pipelines/embedded/{model}/README.md" for model in models}
    assert cards <= inside <= set(wheel.namelist())
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_embedded_model_stays_small():
    files = [path for path in (EMBEDDED / "image").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert max(path.stat().st_size for path in files) <= 15e6


def test_folder_names_do_not_shadow_other_packages(tmp_path):
    """The checkout has a folder `kernels`, also the name of a package that diffusers probes."""
    code = "import sys, diffaccel; print('kernels' in sys.modules)\nimport kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"
    assert "No module named 'kernels'" in done.stderr


@pytest.mark.slow
def test_import_adds_no_heavy_module_to_what_diffusers_loads(tmp_path):
    """Attaching needs the pipeline base classes; anything beyond them would slow every start."""
    code = (
        "import sys, torch\n"
        "from diffusers import DiffusionPipeline, ModularPipeline\n"
        "def heavy():\n"
        "    marks = ('triton', 'diffusers.models.', 'diffusers.pipelines.')\n"
        "    return {m for m in sys.modules if m.startswith(marks)}\n"
        "before = heavy()\n"
        "import diffaccel\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted(heavy() - before - {'diffusers.models.attention_dispatch'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
