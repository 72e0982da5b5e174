"""What the tests of compositions share."""

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """All tests of this folder run so: their tensors are tiny."""
