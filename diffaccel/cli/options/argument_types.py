"""How words of the command line are read: each kind refuses in one sentence.

A sentence begins with its rule; the name of the option is put before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, get_origin

from cyclopts import Parameter, Token

from diffaccel.errors import InputError


def number(
    kind: type[int] | type[float], rule: str, holds: Callable[[float], bool], metavar: str
) -> Parameter:
    """Returns how a number is read, or several of them where the option is a tuple.

    Args:
        kind: int or float.
        rule: What must hold, in words.
        holds: The same as a function; NaN must fail it.
        metavar: Stands for the number in help texts.
    """

    def read(target: Any, tokens: Sequence[Token]) -> Any:
        numbers = tuple(map(read_one, tokens))
        return numbers if get_origin(target) is tuple else numbers[0]

    def read_one(token: Token) -> float:
        try:
            value = kind(token.value)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise ValueError(f"must be {rule}, got {token.value!r}")
        return value

    return Parameter(converter=read, metavar=metavar)


COUNT = number(int, "an integer of at least 1", lambda value: value >= 1, "N")
SEED = number(int, "an integer of at least 0", lambda value: value >= 0, "S")
POSITIVE = number(float, "above 0 and finite", lambda value: 0 < value < inf, "S")
SHARE = number(float, "in (0, 1], above 0 and at most 1", lambda value: 0 < value <= 1, "U")


def _read_size(_target: object, tokens: Sequence[Token]) -> tuple[int, int]:
    text = tokens[0].value
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.strip().lower(), re.ASCII)
    if not match:
        raise ValueError(f"must be WxH in pixels, got {text!r}; write --size 1024x768")
    return int(match[1]), int(match[2])


SIZE = Parameter(converter=_read_size, metavar="WxH", n_tokens=1, accepts_keys=False)


def model_source(name: str | None) -> str | None:
    """Returns a diffusers folder or hub name; "embedded-unet" is the U-Net in the package."""
    if name != "embedded-unet":
        return name
    from diffaccel.pipelines.embedded import EMBEDDED_UNET

    return str(EMBEDDED_UNET)


def usable_device(name: str | None) -> str:
    """Returns the name if PyTorch can put a tensor there, and the best device for None."""
    import torch

    from diffaccel.machine import best_device

    if name is None:
        return best_device()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device must be usable by PyTorch, got {name!r} ({reason}); try --device cpu"
        ) from error
    return name
