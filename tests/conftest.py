"""What all tests share: drawn cases, the error rule, tiny pipelines, threads and memory."""

import os
from types import ModuleType

import pytest
import torch

from diffaccel.benchmarks.ops.error_rule import error_limit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
QUICK_CASES = 10


def pytest_generate_tests(metafunc):
    """Gives each drawn case its own test; DIFFACCEL_TEST_CASES, if set, times as many.

    All but the first ones are slow.
    """
    for marker in metafunc.definition.iter_markers("drawn"):
        factor = int(os.environ.get("DIFFACCEL_TEST_CASES", "1"))
        seeds = range(marker.args[0] * factor)
        slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in seeds[QUICK_CASES:]]
        metafunc.parametrize("seed", [*seeds[:QUICK_CASES], *slow])


@pytest.fixture(scope="session")
def tiny_pipelines() -> ModuleType:
    """The module of tiny pipelines."""
    import tiny_pipelines

    return tiny_pipelines


@pytest.fixture
def one_thread():
    """Tiny tensors on many threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def assert_close_to_oracle():
    """Returns `check(output, expected, twin=None)`, which applies the error rule.

    `expected` is the fp64 oracle, `twin` the same-dtype SDPA result: the rule is that of the
    kernel benchmark.
    """

    def check(output, expected, twin=None):
        assert torch.isfinite(output).all(), "the output has NaN or inf"
        error = (output.double() - expected).abs().max().item()
        off = None if twin is None else (twin.double() - expected).abs().max().item()
        limit = error_limit(output.dtype, off)
        assert error <= limit, f"largest error {error:.2e} is beyond {limit:.2e}"

    return check


@pytest.fixture
def poisoned_empty():
    """Fills every uninitialised float allocation with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
