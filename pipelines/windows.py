"""Windows of native size: what they are for, and in which steps and layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from diffaccel.methods import Method
from diffaccel.methods.windows.base import WindowMethod
from diffaccel.methods.wrapping import WrappingMethod

AnyMethod = TypeVar("AnyMethod", bound=Method)


def has_windows(method: Method) -> bool:
    """Whether a method, or what it wraps, attends windows: then it decides the composition."""
    if isinstance(method, WrappingMethod):
        return has_windows(method.method)
    return isinstance(method, WindowMethod)


def throughout(method: AnyMethod) -> AnyMethod:
    """Returns windows that hold at every step and layer, unless they name dense ones themselves.

    The published schedules are for models at their native size. Other methods stay as they are.
    """
    if isinstance(method, WrappingMethod):
        inner = throughout(method.method)
        return method if inner is method.method else replace(method, method=inner)
    if not isinstance(method, WindowMethod):
        return method
    return replace(
        method, dense_steps=method.dense_steps or 0, dense_layers=method.dense_layers or 0
    )
