"""What is asked for when a video is generated or planned."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from diffaccel.bindings.rope import Axis
from diffaccel.errors import InputError
from diffaccel.pipelines.image.job import plan_stages
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.long_video import TimeWindows

if TYPE_CHECKING:
    from diffaccel.attach.report import Report


@dataclass(frozen=True, slots=True, eq=False)
class VideoJob:
    """One video per prompt, and how it is made.

    Attributes:
        prompt: What happens; several make a batch, and None goes with `prompt_embeds`.
        size: (width, height) in pixels, multiples of `pixels_per_token` (16, for Wan 2.2 5B 32).
        frames: 1 more than a multiple of 4.
        negative_prompt: What must not be seen.
        prompt_embeds: (B, T, C), in place of the prompts.
        negative_prompt_embeds: (B, T, C), the same for what must not be seen.
        recipe: How to go above native size, or with `TimeWindows` beyond the native length.
        steps: Denoising steps of the native sample.
        seed: Of all noise.
        native: Size (width, height) of the native sample; by default the model's own area.
        positions: How rotary positions along time change, for more frames than the model knows.
        image: First frame, with an image-to-video pipeline.
        video: (B, F, 3, h, w) in [0, 1], refined in place of a native sample.
        arguments: Further arguments of the call of a stock pipeline other than Wan, such as masks
            of embeddings.

    Raises:
        InputError: There are no steps, or `TimeWindows` are asked to start from something.
    """

    prompt: str | list[str] | None
    size: tuple[int, int]
    frames: int
    _: KW_ONLY
    negative_prompt: str | None = None
    prompt_embeds: Tensor | None = field(default=None, repr=False)
    negative_prompt_embeds: Tensor | None = field(default=None, repr=False)
    recipe: FreeSwim | TimeWindows = FreeSwim()
    steps: int = 50
    seed: int = 0
    native: tuple[int, int] | None = None
    positions: Axis | None = None
    image: Image.Image | None = None
    video: Tensor | None = field(default=None, repr=False)
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got steps={self.steps}")
        if isinstance(self.recipe, TimeWindows):
            names = ("native", "positions", "image", "video")
            given = [name for name in names if getattr(self, name) is not None]
            if given:
                raise InputError(
                    "windows along time denoise pure noise at the model's own positions and size, "
                    f"got {', '.join(given)}; leave it out or use FreeSwim"
                )

    @property
    def label(self) -> str:
        """The size in words, which names phases."""
        return f"{self.size[0]}x{self.size[1]}"

    @property
    def told(self) -> dict[str, Any]:
        """The prompts, or their embeddings, as a pipeline takes them."""
        embeds = {
            "prompt_embeds": self.prompt_embeds,
            "negative_prompt_embeds": self.negative_prompt_embeds,
        }
        given = {name: value for name, value in embeds.items() if value is not None}
        return given or {"prompt": self.prompt, "negative_prompt": self.negative_prompt}

    @property
    def call(self) -> dict[str, Any]:
        """What is told, the first frame, and the length, as a stock pipeline takes them."""
        image = {} if self.image is None else {"image": self.image}
        told = {name: value for name, value in self.told.items() if value is not None}
        return told | image | {"num_frames": self.frames} | self.arguments

    def stages(self, start: tuple[int, int], multiple: int) -> tuple[VideoJob, ...]:
        """Returns one job for each size that a clip passes through from a size on.

        Args:
            start: (width, height) in pixels.
            multiple: Of which all sides are multiples.
        """
        if start == self.size or isinstance(self.recipe, TimeWindows):
            return ()
        side = round(sqrt(start[0] * start[1]))
        _, *sizes = plan_stages(*self.size, side, self.recipe.max_upscale, multiple)
        return tuple(replace(self, size=size) for size in sizes or [self.size])

    def labelled(self, stage: VideoJob, reports: dict[str, Report]) -> dict[str, Report]:
        """Names the reports of a stage, with its size where there are several."""
        if stage.size == self.size:
            return reports
        return {f"{name} {stage.label}": report for name, report in reports.items()}

    @property
    def batch(self) -> int:
        """Number of videos."""
        prompts = self.prompt if self.prompt_embeds is None else self.prompt_embeds
        return 1 if prompts is None or isinstance(prompts, str) else len(prompts)
