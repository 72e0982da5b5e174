"""Predicts whether a sparse method pays, so that attached layers run dense where it does not.

The prediction is a function of the shape, the configuration and the device alone: the same run
gives the same picture every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method

LEAST_GAIN = 0.98
"""Sparse attention runs where its predicted time is at most this share of the dense time."""

EXPECTED_SLOWER = "expected to take"
"""How the reason of a call begins that this prediction makes dense."""

CPU_TOKENS = 4096
"""Visual tokens from which the prediction counts on a CPU; below, a call takes milliseconds."""

GPU_OVERHEAD_MS = 0.2
"""Of order, estimate, selection and some twenty launches on a GPU. Assumed, not measured."""

# Dense products of 16-bit floats per multiprocessor and clock, from datasheets.
_FLOP_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_FLOP_PER_CLOCK_ELSEWHERE = 1024
_CLOCK_HZ = 1.7e9
_DENSE_SHARE = 0.6  # of that peak, which the best dense attention reaches


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the prediction knows of a device.

    Args:
        kind: As `torch.device` calls it: "cpu", "cuda", ...
        capability: Compute capability of a CUDA device.
        multiprocessors: Their number on a CUDA device.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0

    @property
    def dense_flop_rate(self) -> float:
        """FLOP/s of dense 16-bit attention on a CUDA device, estimated."""
        per_clock = _FLOP_PER_CLOCK.get(self.capability, _FLOP_PER_CLOCK_ELSEWHERE)
        return _DENSE_SHARE * self.multiprocessors * per_clock * _CLOCK_HZ


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> DeviceFacts:
    """Reads the facts of a device."""
    if device.type != "cuda":
        return DeviceFacts(device.type)
    found = torch.cuda.get_device_properties(device)
    return DeviceFacts("cuda", (found.major, found.minor), found.multi_processor_count)


def slower_reason(
    method: Method,
    layout: TokenLayout,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: DeviceFacts,
) -> str:
    """Says why dense attention is expected to be faster than a method, "" where it is not.

    Args:
        method: What would run.
        layout: Its tokens.
        shape: Of the query, (B, N, H, D).
        dtype: Of the query.
        device: Where it would run.
    """
    cost = method.expected_cost(layout, device.kind)
    if cost is None:
        return ""
    if device.kind == "cuda":
        cost += GPU_OVERHEAD_MS / _dense_ms(shape, dtype, device)
    elif layout.visual.length < CPU_TOKENS:
        return ""
    if cost <= LEAST_GAIN:
        return ""
    return f"{EXPECTED_SLOWER} {cost:.2g} times as long as dense attention"


def _dense_ms(shape: tuple[int, ...], dtype: torch.dtype, device: DeviceFacts) -> float:
    batch, length, heads, dim = shape
    slowdown = 8 if dtype == torch.float32 else 1
    return 1e3 * slowdown * 4.0 * batch * heads * length**2 * dim / device.dense_flop_rate
