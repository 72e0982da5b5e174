"""Says in one sentence what is wrong with the words of a command line."""

from __future__ import annotations

import re
from typing import Literal, cast, get_args, get_origin

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

KINDS = {int: "an integer", float: "a number"}


def sentence(error: CycloptsError) -> str:
    """Returns the rule, what was given, and where to look."""
    command = " ".join(("diffaccel", *(error.command_chain or ())))
    return f"{_complaint(error)}; see `{command} --help`"


def missing_command(app: App, words: list[str]) -> str:
    """Returns what is said where the words end before a command was named."""
    for word in words:
        app = app[word]
    name = " ".join(("diffaccel", *words))
    kind = "benchmark" if words == ["bench"] else "command"
    return f"{name} needs a {kind}, one of {_commands(app)}; see `{name} --help`"


def _complaint(error: CycloptsError) -> str:
    if isinstance(error, CoercionError):
        return f"{_name_of(error)} {_broken_rule(error)}"
    if isinstance(error, UnknownOptionError):
        option = error.token.keyword or error.token.value
        suggested = re.search(r"Did you mean (\S+)\?", str(error))
        meant = f", did you mean {suggested[1]}" if suggested else ""
        return f"there is no option {option}{meant}"
    if isinstance(error, UnknownCommandError) and error.app and error.unused_tokens:
        commands = _commands(error.app)
        return f"the command must be one of {commands}, got {error.unused_tokens[0]!r}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return (
            f"there are too many words, got {error.unused_tokens[0]!r}; quote a prompt of several"
        )
    if isinstance(error, MissingArgumentError) and error.argument:
        is_given = error.keyword or error.argument.tokens
        return f"{_name_of(error)} {'needs a value' if is_given else 'is missing'}"
    return " ".join(str(error).split()).rstrip(".")


def _name_of(error: CoercionError | MissingArgumentError) -> str:
    token = getattr(error, "token", None)
    keyword = token.keyword if token else getattr(error, "keyword", None)
    return keyword or (error.argument.name if error.argument else "an argument")


def _broken_rule(error: CoercionError) -> str:
    if error.msg is not None:
        return str(error.msg)
    given = f", got {error.token.value!r}" if error.token else ""
    if get_origin(error.target_type) is Literal:
        return f"must be one of {', '.join(map(str, get_args(error.target_type)))}{given}"
    kind = KINDS.get(cast(type, error.target_type), "of another kind")
    return f"must be {kind}{given}"


def _commands(app: App) -> str:
    return ", ".join(name for name in app if not name.startswith("-"))
