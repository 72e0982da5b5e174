"""The errors that are the caller's to fix; the command line turns each into one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from re import sub
from typing import Any


class InputError(ValueError):
    """An argument or a file that breaks a rule; says the rule, what came, and the remedy."""


class ModelError(InputError):
    """A model that cannot be loaded or that the toolkit does not know how to drive."""


_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "str": (str, "text"),
    "tuple": (Iterable, "a tuple"),
    "None": (type(None), "None"),
}


def check_kinds(config: Any) -> None:
    """Refuses values of the wrong kind in fields annotated as bool, int, float, str or tuple.

    Args:
        config: A dataclass; fields with other annotations are left to its own checks.

    Raises:
        ValueError: A field holds something else: `neighbors="no"` would count as True.
    """
    for field in fields(config):
        is_class = isinstance(field.type, type)
        annotation = field.type.__name__ if is_class else str(field.type)
        names = sub(r"\[[^|]*\]", "", annotation).split(" | ")
        if not set(names) <= _KINDS.keys():
            continue
        value = getattr(config, field.name)
        known = "bool" in names or not isinstance(value, bool)
        if not known or not any(isinstance(value, _KINDS[name][0]) for name in names):
            kinds = " or ".join(_KINDS[name][1] for name in names)
            raise ValueError(f"{field.name} must be {kinds}, got {field.name}={value!r}")
