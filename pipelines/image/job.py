"""What is asked for when a picture is generated, refined or planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log, sqrt

from diffaccel.errors import InputError
from diffaccel.methods import FullAttn, JitteredAttn, Method, NeighborhoodAttn, ProportionalAttn
from diffaccel.methods.windows.sliding import SlidingWindowAttn
from diffaccel.pipelines.image.presets import MULTIPLE, Preset
from diffaccel.pipelines.image.recipe import Refinement
from diffaccel.pipelines.windows import has_windows

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One picture, and how it is made.

    Each stage above native size is a job too, of its own size and seed.

    Attributes:
        prompt: What to draw; None where `preset.arguments` has the embeddings of one.
        size: (width, height) in pixels, multiples of the preset's.
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
        check_size(*self.size, self.preset.multiple)
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
        native, multiple = self.preset.native, self.preset.multiple
        sizes = plan_stages(*self.size, native, self.switches.max_upscale, multiple)
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
                trained = (self.preset.native // self.preset.token) ** 2 + self.preset.text
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


def check_size(width: int, height: int, multiple: int = MULTIPLE) -> None:
    """Raises InputError unless both sides are positive multiples of so many pixels."""
    if min(width, height) < 1 or width % multiple or height % multiple:
        near = tuple(max(multiple, round(side / multiple) * multiple) for side in (width, height))
        raise InputError(
            f"width and height must be positive multiples of {multiple}, got {width}x{height}; "
            f"use {near[0]}x{near[1]}"
        )


def plan_stages(
    width: int, height: int, native: int, max_upscale: float, multiple: int = MULTIPLE
) -> tuple[Size, ...]:
    """Lists the sizes that a picture passes through, from native to the one asked for.

    Args:
        width: Final width in pixels.
        height: Final height in pixels.
        native: Side of the model's square training size; the first stage has its area.
        max_upscale: Largest factor between stages.
        multiple: Of which all sides are multiples, as the sides asked for are.

    Returns:
        Sizes (width, height), the last one the final size. A picture of at
        most native area has one stage.
    """
    total = sqrt(width * height) / native
    if total <= 1.0:
        return ((width, height),)
    jumps = max(1, ceil(round(log(total) / log(max_upscale), 6)))

    def shrunk(side: int, index: int) -> int:
        factor = total ** ((jumps - index) / jumps)
        return max(multiple, round(side / factor / multiple) * multiple)

    return (*((shrunk(width, i), shrunk(height, i)) for i in range(jumps)), (width, height))
