"""Chooses between variants of a kernel on the GPU at hand: a right one first, then a fast one."""

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

Variant = TypeVar("Variant")
logger = logging.getLogger(__name__)

# What was found, so that each problem is tried once per process.
_FOUND: dict[Hashable, Any] = {}
_REPETITIONS = 5
_GAIN = 0.98  # of the time of the first variant that another must stay below


def fastest(
    problem: Hashable,
    variants: Sequence[Variant],
    run: Callable[[Variant], tuple[Tensor, ...]],
    time_ms: Callable[[Callable[[], object]], float] | None = None,
) -> Variant:
    """Returns the fastest variant that agrees with the first one.

    At the first call for a problem each variant runs on the data of that call, which waits for
    the device; while a CUDA graph is captured, the first variant is taken instead. A variant
    that does not compile, does not fit the GPU or gives another result is left out.

    Args:
        problem: What decides about speed: device, dtype, sizes, flags.
        variants: What may run; the first one is trusted.
        run: Runs a variant and returns its results.
        time_ms: Times a call; by default with events of the current CUDA device.
    """
    if len(variants) == 1:
        return variants[0]
    if problem not in _FOUND:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return variants[0]
        _FOUND[problem] = _contest(variants, run, time_ms or device_ms)
    return _FOUND[problem]


def _contest(
    variants: Sequence[Variant],
    run: Callable[[Variant], tuple[Tensor, ...]],
    time_ms: Callable[[Callable[[], object]], float],
) -> Variant:
    first, *others = variants
    expected = run(first)
    best, limit = first, _GAIN * time_ms(partial(run, first))
    for variant in others:
        try:
            found = run(variant)
            if not all(map(_agrees, found, expected)):
                logger.warning("%s is left out: it disagrees with %s", variant, first)
                continue
            needed = time_ms(partial(run, variant))
        # Triton has no common base for the errors of its compiler, assembler and driver.
        except Exception as error:  # noqa: BLE001
            logger.info("%s is left out: %s", variant, error)
            continue
        if needed < limit:
            best, limit = variant, needed
    return best


def device_ms(call: Callable[[], object]) -> float:
    """Returns the median time of a call on the current CUDA device, in milliseconds."""
    call()
    spans = []
    for _ in range(_REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in spans)[_REPETITIONS // 2]


def _agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether results differ by rounding alone; rows without keys have an lse of -inf."""
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
