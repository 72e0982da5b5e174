"""Errors at equal density and equal cost, read off measured curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

BEYOND = 1.12  # a curve reaches so far beyond its ends: block counts are whole numbers

Point = tuple[float, float]


def error_at(points: Sequence[Point], density: float) -> float | None:
    """Reads an error off one call's curve, straight between logarithms.

    Args:
        points: (density, error) of one call, in any order.
        density: Where.

    Returns:
        The error, or None where the curve does not reach.
    """
    ordered = dict(sorted(points))
    densities, errors = list(ordered), list(ordered.values())
    if not ordered:
        return None
    if not densities[0] / BEYOND <= density <= densities[-1] * BEYOND:
        return None
    if len(ordered) == 1:
        return errors[0]
    after = min(max(1, int(np.searchsorted(densities, density))), len(densities) - 1)
    (low, high), (left, right) = densities[after - 1 : after + 1], errors[after - 1 : after + 1]
    if min(left, right) <= 0.0:
        return max(left, right)
    share = math.log(density / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(left) + share * math.log(right))


def errors_at(curves: Sequence[Sequence[Point]], density: float) -> list[float] | None:
    """Errors of several calls at one density, None unless all curves reach it."""
    errors = [error_at(points, density) for points in curves]
    found = [error for error in errors if error is not None]
    return found if found and len(found) == len(errors) else None


def mean_at(curves: Sequence[Sequence[Point]], density: float) -> float | None:
    """Mean of `errors_at`."""
    errors = errors_at(curves, density)
    return None if errors is None else fmean(errors)


def quantile_at(
    curves: Sequence[Sequence[Point]], density: float, share: float = 0.9
) -> float | None:
    """Quantile of `errors_at` over calls."""
    errors = errors_at(curves, density)
    return None if errors is None else float(np.quantile(errors, share))
