"""Turns `--method NAME --set knob=value` into a method."""

from __future__ import annotations

import ast
from importlib import import_module
from typing import TYPE_CHECKING

from diffaccel.cli.declared import dataclass_fields
from diffaccel.errors import InputError
from diffaccel.methods.names import METHODS

if TYPE_CHECKING:
    from diffaccel.methods import Method


def parse_method(
    name: str, knobs: tuple[str, ...], defaults: dict[str, object] | None = None
) -> Method:
    """Builds a method from its command-line name and `knob=value` words.

    Args:
        name: A key of `METHODS`.
        knobs: The user's words; they win over `defaults`.
        defaults: Values of knobs that suit the model; those that the method lacks are ignored.

    Raises:
        InputError: The name or a knob is unknown, or a value is out of range.
    """
    if name not in METHODS:
        raise InputError(f"--method must be one of {', '.join(METHODS)}, got {name!r}; choose one")
    known = knobs_of(name)
    values = {knob: value for knob, value in (defaults or {}).items() if knob in known}
    for word in knobs:
        knob, text = _split(word)
        if knob not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise InputError(
                f"--set must name a knob of {name} ({listed}), got {knob!r}; correct the name or "
                "choose another --method"
            )
        values[knob] = _parse_value(text)
    module, _, class_name = METHODS[name].partition(":")
    try:
        return getattr(import_module(module), class_name)(**values)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def check_knob_names(knobs: tuple[str, ...]) -> None:
    """Refuses knobs that no method has, while the method is not known yet.

    Raises:
        InputError: A word is not `knob=value`, or its knob is unknown.
    """
    for knob, _ in map(_split, knobs):
        if not any(knob in knobs_of(name) for name in METHODS):
            raise InputError(
                f"--set must name a knob of a method, got {knob!r}; `diffaccel info` lists them"
            )


def knobs_of(name: str) -> dict[str, str | None]:
    """Returns the knobs of a method with the text of their defaults, None where there is none."""
    return dataclass_fields(METHODS[name])


def _split(word: str) -> tuple[str, str]:
    knob, separator, text = word.partition("=")
    if not separator:
        raise InputError(f"--set takes knob=value, got {word!r}; write --set drop=0.9")
    return knob, text


def _parse_value(text: str) -> object:
    """Reads a Python literal (also true, false, none in lower case), else the text itself."""
    literal = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        return ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
