"""Tokens that a language model writes before a picture is denoised: GLM-Image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRIOR_SIDE = 16
"""Pixels of a prior token as the denoiser takes it."""


@contextmanager
def native_prior(pipe: Any) -> Iterator[None]:
    """Within it, the first picture's prior serves all larger ones, enlarged.

    Written anew at each size, it would show another composition, and cost more than the picture.

    Args:
        pipe: A stock pipeline; those without a prior are left as they are.
    """
    if not hasattr(pipe, "generate_prior_tokens"):
        yield
        return
    own, write = vars(pipe).get("generate_prior_tokens"), pipe.generate_prior_tokens
    written: list[torch.Tensor] = []

    def generate_prior_tokens(*args: Any, height: int, width: int, **kwargs: Any) -> Any:
        if not written:
            tokens, *others = write(*args, height=height, width=width, **kwargs)
            grid = (height // PRIOR_SIDE, width // PRIOR_SIDE)
            written.append(tokens.unflatten(1, grid))
            return (tokens, *others)
        (native,) = written
        size = (height // PRIOR_SIDE, width // PRIOR_SIDE)
        large = torch.nn.functional.interpolate(native[:, None].double(), size)
        return large.long().flatten(1), None, None

    pipe.generate_prior_tokens = generate_prior_tokens
    try:
        yield
    finally:
        del pipe.generate_prior_tokens
        if own is not None:
            pipe.generate_prior_tokens = own
