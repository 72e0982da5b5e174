"""Generating pictures beyond the size on which a model was trained."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.pipelines.image.generate import GeneratedImage, generate_image, refine_image
    from diffaccel.pipelines.image.job import ImageJob, check_size, plan_stages

__all__ = [
    "GeneratedImage",
    "ImageJob",
    "check_size",
    "generate_image",
    "plan_stages",
    "refine_image",
]


def __getattr__(name: str) -> Any:
    # Late, so that `recipe` can be read without loading PyTorch and diffusers.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "job" if name in ("ImageJob", "check_size", "plan_stages") else "generate"
    return getattr(import_module(f"{__name__}.{home}"), name)
