"""The error rule that every kernel test uses."""

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


@pytest.fixture
def poisoned_empty():
    """Fills every uninitialised float allocation with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
