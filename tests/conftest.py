"""The error rule that every kernel test uses, and how many cases they draw."""

import os

import pytest
import torch

from diffaccel.benchmarks.ops.error_rule import error_limit


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


@pytest.fixture(scope="session")
def cases():
    """Returns `cases(n)`, seeds of n drawn cases, DIFFACCEL_TEST_CASES times as many if set."""
    factor = int(os.environ.get("DIFFACCEL_TEST_CASES", "1"))
    return lambda count: range(count * factor)


@pytest.fixture
def poisoned_empty():
    """Fills every uninitialised float allocation with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
