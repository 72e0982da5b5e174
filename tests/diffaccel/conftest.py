"""Tiny pipelines and a watching method for the tests of attaching, bindings and reports."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, field
from types import ModuleType

import pytest
import torch

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.inputs import Attended

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Seen:
    """One call that reached a watching method."""

    layout: TokenLayout
    shape: tuple[int, ...]
    layer: int
    step: int
    key_padding_mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class WatchedAttn(ScheduledMethod):
    """Dense attention that writes down what it gets."""

    _: KW_ONLY
    dense_steps: int | None = 0
    dense_layers: tuple[int, ...] | int | None = 0
    calls: list[Seen] = field(default_factory=list, repr=False, compare=False)

    def compute(self, inputs, position):
        shape = tuple(inputs.query.shape)
        self.calls.append(Seen(inputs.layout, shape, position.layer, position.step, inputs.mask))
        return Attended(inputs.dense(), torch.ones(()))


@pytest.fixture(scope="session")
def tiny_pipelines() -> ModuleType:
    """The module of tiny pipelines."""
    import tiny_pipelines

    return tiny_pipelines


@pytest.fixture
def watched() -> WatchedAttn:
    """A method that writes down what it gets; its schedule is empty."""
    return WatchedAttn()


@pytest.fixture
def watched_class() -> type[WatchedAttn]:
    """The class of the `watched` fixture."""
    return WatchedAttn


@pytest.fixture
def one_thread():
    """Tiny tensors on many threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
