"""The errors that are the caller's to fix; the command line turns each into one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import cache
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
    config_class: Any = type(config)
    for name, kinds in _checked_fields(config_class):
        value = getattr(config, name)
        if type(value).__name__ in kinds:
            continue
        is_known = "bool" in kinds or not isinstance(value, bool)
        if not is_known or not any(isinstance(value, _KINDS[kind][0]) for kind in kinds):
            words = " or ".join(_KINDS[kind][1] for kind in kinds)
            raise ValueError(f"{name} must be {words}, got {name}={value!r}")


@cache
def _checked_fields(config_class: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns the fields that have such an annotation, with the kinds that it names."""
    found = []
    for field in fields(config_class):
        kind: Any = field.type
        annotation = kind.__name__ if isinstance(kind, type) else str(kind)
        kinds = tuple(sub(r"\[[^|]*\]", "", annotation).split(" | "))
        if set(kinds) <= _KINDS.keys():
            found.append((field.name, kinds))
    return tuple(found)
