"""Fixtures of the kernel tests: the random problems beside this file."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def problems():
    """Loads problems.py by path: importlib mode keeps the test folders off sys.path."""
    path = Path(__file__).with_name("problems.py")
    spec = importlib.util.spec_from_file_location("kernel_test_problems", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
