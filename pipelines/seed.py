"""Randomness that no generator of a call decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def seeded(pipe: Any, seed: int) -> Iterator[None]:
    """Makes what a pipeline draws without a generator follow from a seed, for a `with` block.

    Pipelines hand theirs to the scheduler or the autoencoder, or not: HiDream's does not, and its
    FlowMatchLCMScheduler draws noise in each step. The state of the process comes back.
    """
    device = pipe._execution_device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
