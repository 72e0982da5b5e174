"""How each video model is called: native size, steps, and recipes beyond that size and length."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.bindings.rope import Axis, Linear, Riflex
from diffaccel.pipelines import embedded
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import frame_step, native_size
from diffaccel.pipelines.video.long_video import TimeWindows

WIDE = (1 << 20, 9 << 16)  # any size of aspect 16:9, far above every native one


@dataclass(frozen=True, slots=True)
class VideoPreset:
    """Calling conventions of one video model.

    Attributes:
        native: Size (width, height) in pixels of what it was trained on; None: the model's native
            area at 16:9.
        steps: Denoising steps at native size.
        recipe: How to go above native size; its guidance also holds at native size.
        windows: How to go beyond the native length with `--recipe windows`.
        latent_frames: Native length in latent frames.
        stretch: How positions along time change for a larger number of latent frames.
    """

    native: tuple[int, int] | None = None
    steps: int = 50
    recipe: FreeSwim = FreeSwim()
    windows: TimeWindows = TimeWindows()
    latent_frames: int = 21
    stretch: Callable[[int], Axis] = Riflex

    def positions_for(self, pipe: Any, frames: int) -> Axis | None:
        """Returns how positions along time change for a video of so many frames, if they do."""
        length = (frames - 1) // frame_step(pipe) + 1
        return self.stretch(length) if length > self.latent_frames else None

    def size_for(self, pipe: Any) -> tuple[int, int]:
        """Returns the size (width, height) in pixels of a video for which none was asked."""
        return self.native or native_size(pipe, *WIDE)


def _slower(length: int) -> Linear:
    """What takes 5 latent frames takes all: the embedded model knows whole motions alone."""
    return Linear(length / 5)


WAN = VideoPreset()
# 8 x 8 tokens are the 128 pixels that it was trained on. It redraws less than the large models:
# from more noise it would compose anew, which it can at native size alone.
EMBEDDED_VIDEO_PRESET = VideoPreset(
    native=(128, 128),
    steps=20,
    recipe=FreeSwim(steps=20, strength=0.4, shift=2.0, guidance_scale=3.0),
    windows=TimeWindows(length=5, overlap=2, guidance_scale=3.0),
    latent_frames=5,
    stretch=_slower,
)


def video_preset(source: str | Path, class_name: str = "WanPipeline") -> VideoPreset:
    """Returns the preset of a pipeline by what it is loaded from, and by its class."""
    if Path(source).resolve() == embedded.EMBEDDED_VIDEO.resolve():
        return EMBEDDED_VIDEO_PRESET
    family = VIDEO_FAMILIES.get(class_name)
    if family is None:
        return WAN
    windows = TimeWindows() if isinstance(family.windows, str) else family.windows
    return VideoPreset(family.native, family.steps, family.recipe, windows, 1 << 30)
