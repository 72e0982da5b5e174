"""Generating clips beyond the size and the length on which a model was trained."""

from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import GeneratedVideo, check_video_size, generate_video
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
