"""Turns `--method NAME --set knob=value` into a method."""

import argparse
import ast
from dataclasses import fields

from diffaccel.errors import InputError
from diffaccel.methods import (
    AgentAttn,
    FullAttn,
    Method,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SlidingWindowAttn,
    SparseAttn,
    TokenMergingAttn,
)

METHODS: dict[str, type[Method]] = {
    "full": FullAttn,
    "sparse": SparseAttn,
    "rectified": RectifiedSpaAttn,
    "neighborhood": NeighborhoodAttn,
    "sliding-window": SlidingWindowAttn,
    "agent": AgentAttn,
    "token-merging": TokenMergingAttn,
}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--method` and `--set` to a parser."""
    parser.add_argument(
        "--method",
        metavar="NAME",
        help=f"attention above native size: {', '.join(METHODS)} (default: what suits the model)",
    )
    parser.add_argument(
        "--set",
        dest="knobs",
        action="append",
        default=[],
        metavar="KNOB=VALUE",
        help="a knob of the method, repeatable, such as --set drop=0.9; `diffaccel info` has all",
    )


def parse_method(name: str, knobs: list[str], defaults: dict[str, object] | None = None) -> Method:
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
    known = _knobs_of(METHODS[name])
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
    try:
        return METHODS[name](**values)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def check_knob_names(knobs: list[str]) -> None:
    """Refuses knobs that no method has, while the method is not known yet.

    Raises:
        InputError: A word is not `knob=value`, or its knob is unknown.
    """
    for knob, _ in map(_split, knobs):
        if not any(knob in _knobs_of(method) for method in METHODS.values()):
            raise InputError(
                f"--set must name a knob of a method, got {knob!r}; `diffaccel info` lists them"
            )


def _knobs_of(method: type[Method]) -> set[str]:
    return {field.name for field in fields(method)}


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
    except (ValueError, SyntaxError):
        return text
