"""What is asked for when a picture is generated, refined or planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log, sqrt

from diffaccel.errors import InputError
from diffaccel.methods import FullAttn, JitteredAttn, Method, NeighborhoodAttn, ProportionalAttn
from diffaccel.methods.windows.sliding import SlidingWindowAttn
from diffaccel.pipelines.image.presets import Preset
from diffaccel.pipelines.image.recipe import Refinement
from diffaccel.pipelines.windows import has_windows

MULTIPLE = 16  # pixels per token and axis in the latent models
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One picture, and how it is made.

    Each stage above native size is a job too, of its own size and seed.

    Attributes:
        prompt: What to draw; None where `preset.arguments` has the embeddings of one.
        size: (width, height) in pixels, multiples of 16.
        preset: How the pipeline is called.
        method: Attention above native size, full by default; the native sample runs the stock one.
        refinement: Stages and switches above native size, the preset's by default.
        steps: Denoising steps at native size, the preset's by default.
        seed: Of all noise; equal seeds give equal bits on one machine.
        always: Whether the method runs even where dense attention is expected to be faster.
            Windows always do.

    Raises:
        InputError: The size breaks the rule of `check_size`, or the method has no borders to
            jitter.
    """

    prompt: str | None
    size: Size
    preset: Preset
    method: Method = FullAttn()
    refinement: Refinement | None = None
    steps: int | None = None
    seed: int = 0
    always: bool = True

    def __post_init__(self) -> None:
        check_size(*self.size)
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got steps={self.steps}")
        self._jittered()

    @property
    def label(self) -> str:
        """The size in words, which names phases and reports."""
        return f"{self.size[0]}x{self.size[1]}"

    @property
    def switches(self) -> Refinement:
        """The refinement that holds."""
        return self.refinement or self.preset.refinement

    @property
    def native_steps(self) -> int:
        """Denoising steps at native size."""
        return self.steps or self.preset.steps

    @property
    def stages(self) -> tuple[ImageJob, ...]:
        """One job for each size that the picture passes through, see `plan_stages`."""
        sizes = plan_stages(*self.size, self.preset.native, self.switches.max_upscale)
        return tuple(
            replace(self, size=size, seed=self.seed + index) for index, size in enumerate(sizes)
        )

    @property
    def attention(self) -> Method:
        """The method as the switches `jitter` and `proportional` wrap it."""
        method = self._jittered()
        if self.switches.proportional:
            trained = None  # joint sequences have one size, the levels of a U-Net say theirs
            if self.preset.text:
                trained = (self.preset.native // MULTIPLE) ** 2 + self.preset.text
            method = ProportionalAttn(method, trained)
        return method

    @property
    def is_for_speed(self) -> bool:
        """Whether the method gives way where dense attention is expected to be faster."""
        return not self.always and not has_windows(self.method)

    def _jittered(self) -> Method:
        if not self.switches.jitter:
            return self.method
        if not isinstance(self.method, NeighborhoodAttn | SlidingWindowAttn):
            raise InputError(
                "jitter moves the borders of windows, which NeighborhoodAttn and "
                f"SlidingWindowAttn have, got {type(self.method).__name__}; choose another method "
                "or leave the jitter out"
            )
        return JitteredAttn(self.method, self.seed)


def check_size(width: int, height: int) -> None:
    """Raises InputError unless both sides are positive multiples of 16 pixels."""
    if min(width, height) < 1 or width % MULTIPLE or height % MULTIPLE:
        near = tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (width, height))
        raise InputError(
            f"width and height must be positive multiples of {MULTIPLE}, got {width}x{height}; "
            f"use {near[0]}x{near[1]}"
        )


def plan_stages(width: int, height: int, native: int, max_upscale: float) -> tuple[Size, ...]:
    """Lists the sizes that a picture passes through, from native to the one asked for.

    Args:
        width: Final width in pixels.
        height: Final height in pixels.
        native: Side of the model's square training size; the first stage has its area.
        max_upscale: Largest factor between stages.

    Returns:
        Sizes (width, height), all multiples of 16, the last one the final size. A picture of at
        most native area has one stage.
    """
    total = sqrt(width * height) / native
    if total <= 1.0:
        return ((width, height),)
    jumps = max(1, ceil(round(log(total) / log(max_upscale), 6)))

    def shrunk(side: int, index: int) -> int:
        factor = total ** ((jumps - index) / jumps)
        return max(MULTIPLE, round(side / factor / MULTIPLE) * MULTIPLE)

    return (*((shrunk(width, i), shrunk(height, i)) for i in range(jumps)), (width, height))
