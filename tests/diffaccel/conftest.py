"""A method that watches, for the tests of attaching, bindings and reports."""

import pytest
from watched import WatchedAttn


@pytest.fixture
def watched() -> WatchedAttn:
    """A method that writes down what it gets; its schedule is empty."""
    return WatchedAttn()


@pytest.fixture
def watched_class() -> type[WatchedAttn]:
    """The class of the `watched` fixture."""
    return WatchedAttn


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """All tests of this folder run so: their tensors are tiny."""
