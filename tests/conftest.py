"""The error rule that every kernel test uses."""

import pytest
import torch


@pytest.fixture(scope="session")
def assert_close_to_oracle():
    """Returns `check(output, expected, twin=None)`, which applies the error rule.

    `expected` is the fp64 oracle. With a `twin`, the same-dtype SDPA result, the largest error
    may be twice the twin's plus a rounding; without one an absolute table applies.
    """
    table = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    tiny = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}

    def check(output, expected, twin=None):
        assert torch.isfinite(output).all(), "the output has NaN or inf"
        error = (output.double() - expected).abs().max().item()
        limit = table[output.dtype]
        if twin is not None:
            limit = 2 * (twin.double() - expected).abs().max().item() + tiny[output.dtype]
        assert error <= limit, f"largest error {error:.2e} is beyond {limit:.2e}"

    return check


@pytest.fixture
def poisoned_empty():
    """Fills every uninitialised float allocation with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
