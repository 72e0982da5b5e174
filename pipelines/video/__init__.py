"""Generating clips beyond the size and the length on which a model was trained."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.pipelines.video.freeswim import FreeSwim
    from diffaccel.pipelines.video.generate import (
        GeneratedVideo,
        check_video_size,
        generate_video,
    )
    from diffaccel.pipelines.video.job import VideoJob
    from diffaccel.pipelines.video.long_video import TimeWindows

__all__ = [
    "FreeSwim",
    "GeneratedVideo",
    "TimeWindows",
    "VideoJob",
    "check_video_size",
    "generate_video",
]


def __getattr__(name: str) -> Any:
    # Late, so that `recipes` can be read without loading PyTorch and diffusers.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.generate"), name)
