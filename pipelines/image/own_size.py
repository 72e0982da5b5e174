"""Sizes that pipelines choose for themselves, and those for which a denoiser has no positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isqrt, sqrt
from typing import Any

from diffaccel.errors import InputError
from diffaccel.pipelines.image.job import ImageJob, Size
from diffaccel.pipelines.image.presets import denoiser

LONGEST_SIDE: dict[str, Callable[[Any], int]] = {
    "AuraFlowTransformer2DModel": lambda config: isqrt(config.pos_embed_max_size),
    "CogView3PlusTransformer2DModel": lambda config: config.pos_embed_max_size,
    "Lumina2Transformer2DModel": lambda config: min(config.axes_lens[1:]),
    "LuminaNextDiT2DModel": lambda _config: 384,  # its pipeline builds that many
    "SD3Transformer2DModel": lambda config: config.pos_embed_max_size,
    "ZImageTransformer2DModel": lambda config: min(config.axes_lens[1:]),
}
"""Tokens along one side for which a denoiser has positions, by its class, from its settings.

Denoisers that are not here compute theirs.
"""


@contextmanager
def at_size(pipe: Any, size: Size) -> Iterator[None]:
    """Makes a pipeline draw the size it is asked for where it would take one of its own.

    Kandinsky 5 takes the nearest one of a list, HiDream the same aspect at its native area.

    Args:
        pipe: A stock text-to-image pipeline.
        size: (width, height) in pixels.
    """
    changes: dict[str, Any] = {}
    if hasattr(pipe, "resolutions"):
        changes["resolutions"] = [size]
    if type(pipe).__name__ == "HiDreamImagePipeline":
        # A little more, as the pipeline rounds down.
        side = sqrt(size[0] * size[1]) * (1 + 1e-9)
        changes["default_sample_size"] = side / pipe.vae_scale_factor
    before = {name: getattr(pipe, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(pipe, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(pipe, name, value)


def check_positions(pipe: Any, job: ImageJob) -> None:
    """Refuses a size for which the denoiser has no positions: some would repeat others'.

    Raises:
        InputError: A side or the area is too large.
    """
    model, token = denoiser(pipe), job.preset.token
    name = type(model).__name__
    width, height = (side // token for side in job.size)
    if name == "HiDreamImageTransformer2DModel" and width != height:
        if width * height > model.max_seq:
            raise InputError(
                f"{name} takes pictures that are not square of at most {model.max_seq} tokens, "
                f"{job.label} has {width * height}; choose a square or fewer pixels"
            )
    if name in LONGEST_SIDE and max(width, height) > LONGEST_SIDE[name](model.config):
        longest = LONGEST_SIDE[name](model.config)
        raise InputError(
            f"this {name} has positions for at most {longest} tokens along a side, {job.label} "
            f"needs {max(width, height)}; choose sides of at most {longest * token} pixels"
        )
