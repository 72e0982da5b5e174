"""What a benchmark knows of an attention op: how to prepare a call, and what it must compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from diffaccel.benchmarks.ops.error_rule import Expected
from diffaccel.benchmarks.ops.problems import Inputs, Problem
from diffaccel.benchmarks.ops.roofline import Work


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One op on one set of inputs, ready to be called again and again.

    Args:
        run: Computes (1, N, H, D); this is what is timed.
        expected: What `run` must return.
        kept_pairs: Query-key pairs, over all heads, that `run` computes exactly.
        index: Estimates, selects and corrects, where that is part of using the op.
        order: Puts query, key and value in block order and the output back, where that is.
        extra: Work beside that of the pairs: reading lists, summaries and corrections.
    """

    run: Callable[[], Tensor]
    expected: Expected
    kept_pairs: int
    index: Callable[[], object] | None = None
    order: Callable[[], object] | None = None
    extra: Work = Work(0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One competitor.

    Args:
        name: What is computed, and with which lists.
        backend: Who computes it.
        prepare: Makes the call; may take its time.
        reason_against: Says why it cannot run a problem, or None where it can.
        is_dense: Whether it computes every pair, whatever the density.
    """

    name: str
    backend: str
    prepare: Callable[[Problem, Inputs], Prepared]
    reason_against: Callable[[Problem], str | None]
    is_dense: bool = False

    @property
    def label(self) -> str:
        """Name and backend."""
        return f"{self.name} [{self.backend}]"


def always(_problem: Problem) -> str | None:
    """Nothing speaks against an op that runs everywhere."""
    return None


def needs_cuda_package(package: str) -> Callable[[Problem], str | None]:
    """Says whether an optional package is missing, or the device is not one it runs on."""

    def reason(problem: Problem) -> str | None:
        if find_spec(package) is None:
            return f"{package} is not installed"
        if problem.device.type != "cuda":
            return f"{package} needs a CUDA device"
        return None

    return reason
