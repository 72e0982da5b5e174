"""How each video model is called: native size, steps, and recipes beyond that size and length."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from diffaccel.pipelines.freeswim import FreeSwim
from diffaccel.pipelines.long_video import TimeWindows
from diffaccel.pipelines.video import native_size

WIDE = (1 << 20, 9 << 16)  # any size of aspect 16:9, far above every native one


@dataclass(frozen=True, slots=True)
class VideoPreset:
    """Calling conventions of one video model.

    Attributes:
        native: Size (width, height) in pixels of what it was trained on; None: the model's native
            area at 16:9.
        steps: Denoising steps at native size.
        recipe: How to go above native size; its guidance also holds at native size.
        windows: How to go beyond the native length.
    """

    native: tuple[int, int] | None = None
    steps: int = 50
    recipe: FreeSwim = FreeSwim()
    windows: TimeWindows = TimeWindows()

    def size_for(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        """Returns the size (width, height) in pixels of a video for which none was asked."""
        return self.native or native_size(pipe, *WIDE)


WAN = VideoPreset()
# 8 x 8 tokens are the 128 pixels that it was trained on. It redraws less than the large models:
# from more noise it would compose anew, which it can at native size alone.
EMBEDDED_VIDEO_PRESET = VideoPreset(
    native=(128, 128),
    steps=20,
    recipe=FreeSwim(steps=20, strength=0.4, shift=2.0, guidance_scale=3.0),
    windows=TimeWindows(length=5, overlap=2),
)


def video_preset(source: str | Path) -> VideoPreset:
    """Returns the preset of a Wan pipeline by what it is loaded from."""
    from diffaccel.pipelines.loading import EMBEDDED_VIDEO

    return EMBEDDED_VIDEO_PRESET if Path(source) == EMBEDDED_VIDEO else WAN
