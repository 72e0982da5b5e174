"""What pyproject.toml asks for is what constraints.txt pins and diffusers needs."""

import importlib.metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def test_what_pipelines_need_at_run_time_is_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {Requirement(line).name for line in project["dependencies"]}
    assert {"ftfy", "sentencepiece", "protobuf"} <= named
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    for line in (*project["dependencies"], *extras):
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        assert requirement.name == "xformers" or requirement.specifier.contains(version), line


def test_no_bound_is_below_what_diffusers_asks_for():
    """Bounds that no install can reach say nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {Requirement(line).name: Requirement(line) for line in project["dependencies"]}
    for asked in map(Requirement, importlib.metadata.requires("diffusers")):
        if asked.marker is None and asked.name.lower() in own:
            specifier = own[asked.name.lower()].specifier
            (floor,) = (part.version for part in specifier if part.operator == ">=")
            assert not asked.specifier or asked.specifier.contains(floor), asked
    python = importlib.metadata.metadata("diffusers")["Requires-Python"]
    assert python.startswith(project["requires-python"])
