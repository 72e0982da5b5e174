"""Ways beyond the size on which an image model was trained: stages and independent switches."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal, get_args

from diffaccel.errors import check_kinds

Rope = Literal["plain", "ntk", "yarn"]
Shift = float | Literal["size"] | None

IMAGE_RECIPES: dict[str, str] = {
    "direct": "at full size at once",
    "window": "one jump from the native sample, with windows alone",
    "guided": "the same under the low frequencies of the native sample",
    "cascade": "guided, in stages that at most double the sides; the default",
}
"""Ways beyond native size, as `--recipe` names them."""

AT_ONCE = 64.0
"""A `max_upscale` that makes one stage of every picture."""


@dataclass(frozen=True, slots=True)
class Refinement:
    """How a picture gets beyond the size on which its model was trained.

    By default it is carried from one size to the next (SDEdit, Meng et al., 2021,
    https://arxiv.org/abs/2108.01073): upscaled, noised part of the way, denoised. The other
    switches are independent of each other and work above native size alone.

    Attributes:
        steps: Denoising steps of each stage.
        strength: Share of the noise schedule that is redone, in (0, 1]. More adds detail and
            may change content.
        max_upscale: Largest factor per stage and axis, above 1; larger jumps pass through sizes
            between: 2 makes the cascade 1x, 2x, 4x.
        guidance: Share of the low frequencies that the smaller picture decides at the first step,
            0 to 1, falling to nothing. See `diffaccel.pipelines.image.low_frequency`.
        guidance_levels: Low frequencies are means over 2 ** this many latent elements and axis.
        direct: Whether the picture is sampled at its full size at once, from noise, instead;
            `steps` to `guidance_levels` then have no effect.
        shift: Of the noise schedule of flow models (FLUX, SD3, Qwen-Image): more spends more
            steps on composition. "size": the native one times sqrt(tokens / native tokens)
            ("Scaling Rectified Flow Transformers", Esser et al., 2024,
            https://arxiv.org/abs/2403.03206). None: the pipeline's own.
        rope: How rotary positions (FLUX) are scaled to the size. See `diffaccel.bindings.rope.Ntk`
            and `diffaccel.bindings.rope.Yarn`; plain leaves them. Windows of native size do not
            need it: inside them all distances are known.
        proportional: Whether the softmax is sharpened for the number of tokens. See
            `diffaccel.methods.proportional.ProportionalAttn`. Windows do not need it either.
        jitter: Whether windows that queries share move at every step, so that their borders
            average out. See `diffaccel.methods.windows.jittered.JitteredAttn`.
    """

    steps: int
    strength: float
    max_upscale: float = 4.0
    guidance: float = 0.0
    guidance_levels: int = 1
    direct: bool = False
    shift: Shift = None
    rope: Rope = "plain"
    proportional: bool = False
    jitter: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 <= self.guidance <= 1.0 or self.guidance_levels < 1:
            raise ValueError(
                "guidance must lie in 0 to 1 and guidance_levels be at least 1, got "
                f"guidance={self.guidance}, guidance_levels={self.guidance_levels}"
            )
        if self.steps < 1 or not 0.0 < self.strength <= 1.0:
            raise ValueError(
                "steps must be at least 1 and strength lie in (0, 1], got "
                f"steps={self.steps}, strength={self.strength}"
            )
        if not 1.0 < self.max_upscale < inf:
            raise ValueError(
                f"max_upscale must exceed 1, got max_upscale={self.max_upscale}; pass a number "
                "above 1, 2 doubles both sides in each stage"
            )
        if self.rope not in get_args(Rope):
            raise ValueError(
                f"rope must be one of {', '.join(get_args(Rope))}, got rope={self.rope!r}"
            )
        is_number = isinstance(self.shift, int | float) and 0 < self.shift < inf
        if self.shift not in (None, "size") and not is_number:
            raise ValueError(
                f'shift must be positive, "size" or None, got shift={self.shift!r}; pass a '
                "number above 0 or size, None leaves the schedule as it is"
            )

    @property
    def schedule(self) -> int:
        """Steps of the whole noise schedule of a stage, of which the last `strength` run."""
        return max(1, round(self.steps / self.strength))

    @property
    def executed_steps(self) -> int:
        """Denoising steps of a stage that run, as image-to-image pipelines round them."""
        return self.schedule - int(max(self.schedule - self.schedule * self.strength, 0))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named way beyond native size: stages and switches, with the attention that suits them.

    Attributes:
        refinement: Stages and switches.
        method: Command-line name of the attention method above native size.
        knobs: Values of the method's knobs that suit this model better than the general
            defaults; knobs that a method lacks are passed over.
    """

    refinement: Refinement
    method: str
    knobs: dict[str, object] = field(default_factory=dict)
