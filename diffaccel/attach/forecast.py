"""Predicts whether a sparse method pays, so that attached layers run dense where it does not.

The prediction is a function of the shape, the configuration and the device alone: the same run
gives the same picture every time.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method

LEAST_GAIN = 0.98
"""Sparse attention runs where its predicted time is at most this share of the dense time."""

CPU_TOKENS = 4096
"""Visual tokens from which the prediction counts on a CPU; below, a call takes milliseconds."""

GPU_OVERHEAD_MS = 0.2
"""Of order, estimate, selection and some twenty launches on a GPU. Assumed, not measured."""

# Dense products of 16-bit floats per multiprocessor and clock, from datasheets.
_FLOP_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_FLOP_PER_CLOCK_ELSEWHERE = 1024
_CLOCK_HZ = 1.7e9
_DENSE_SHARE = 0.6  # of that peak, which the best dense attention reaches


def slower_reason(method: Method, layout: TokenLayout, query: Tensor) -> str:
    """Says why dense attention is expected to be faster than a method, "" where it is not.

    Args:
        method: What would run.
        layout: Its tokens.
        query: (B, N, H, D), for its shape, dtype and device.
    """
    cost = method.expected_cost(layout, query.device.type)
    if cost is None:
        return ""
    if query.device.type == "cuda":
        cost += GPU_OVERHEAD_MS / _dense_ms(query)
    elif layout.visual.length < CPU_TOKENS:
        return ""
    if cost <= LEAST_GAIN:
        return ""
    return f"expected to take {cost:.2g} times as long as dense attention"


def _dense_ms(query: Tensor) -> float:
    batch, length, heads, dim = query.shape
    flop = 4.0 * batch * heads * length**2 * dim
    slowdown = 8 if query.dtype == torch.float32 else 1
    return 1e3 * slowdown * flop / _dense_flop_rate(query.device)


@lru_cache(maxsize=64)
def _dense_flop_rate(device: torch.device) -> float:
    """Estimates FLOP/s of dense 16-bit attention on a CUDA device."""
    facts = torch.cuda.get_device_properties(device)
    per_clock = _FLOP_PER_CLOCK.get((facts.major, facts.minor), _FLOP_PER_CLOCK_ELSEWHERE)
    return _DENSE_SHARE * facts.multi_processor_count * per_clock * _CLOCK_HZ
