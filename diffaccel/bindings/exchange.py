"""Exchanging a part of a denoiser for a while, and putting it back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While active, an attribute of an object is another one; what was there comes back."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def exchanged_forward(module: Any, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Lets a module run `forward(module, ...)` instead of its own, which returns afterwards."""
    return exchanged(module, "forward", MethodType(forward, module))
