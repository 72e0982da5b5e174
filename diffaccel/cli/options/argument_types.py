"""Types of command-line arguments: each refuses in one sentence."""

import argparse
import re
from collections.abc import Callable

from diffaccel.errors import InputError


def at_least(least: int) -> Callable[[str], int]:
    """Returns an argument type for integers of at least `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text}")
        return number

    return parse


def share(text: str) -> float:
    """Reads a share in (0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return number


def model_source(text: str) -> str:
    """Returns a diffusers folder or hub name; "embedded-unet" is the U-Net in the package."""
    if text != "embedded-unet":
        return text
    from diffaccel.pipelines.loading import EMBEDDED_UNET

    return str(EMBEDDED_UNET)


def usable_device(name: str) -> str:
    """Returns the name if PyTorch can put a tensor there."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device must be usable by PyTorch, got {name!r} ({reason}); try --device cpu"
        ) from error
    return name


def parse_size(text: str) -> tuple[int, int]:
    """Reads `WxH`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not match:
        raise InputError(f"--size must be WxH in pixels, got {text!r}; write --size 1024x768")
    return int(match[1]), int(match[2])
