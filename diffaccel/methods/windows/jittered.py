"""Windows whose borders move from step to step, so that no border stays to be seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from diffaccel.errors import check_kinds
from diffaccel.methods.inputs import Attended, AttentionInputs, Position
from diffaccel.methods.windows.neighborhood import NeighborhoodAttn
from diffaccel.methods.windows.sliding import SlidingWindowAttn
from diffaccel.methods.wrapping import WrappingMethod

_PHASES = 1 << 16  # far above any stride, which phases are taken modulo


@dataclass(frozen=True, slots=True, repr=False)
class JitteredAttn(WrappingMethod):
    """Another method of windows with the borders between its windows drawn anew at each step.

    Queries that share a window (`NeighborhoodAttn` with a stride, the tiles and blocks of
    `SlidingWindowAttn`) have a border to the next group, at which pictures can show a seam.
    Moved at random from step to step, borders average out, as in the random window shift of
    "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion
    Models" (Zhang et al., 2023, https://arxiv.org/abs/2311.17528) and the jitter of I-Max (Du et
    al., 2024, https://arxiv.org/abs/2410.07536). Windows that slide with each query (stride 1)
    have no borders and stay as they are. All layers and both passes of guidance share a step's
    borders; equal seeds give equal ones.

    Args:
        method: The windows, its own phase left out.
        seed: Of the borders.

    Example:
        >>> pipe.set_attn_processor(JitteredAttn(NeighborhoodAttn(64, stride=16)))
    """

    method: NeighborhoodAttn | SlidingWindowAttn = NeighborhoodAttn(64, 16)
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if not isinstance(self.method, NeighborhoodAttn | SlidingWindowAttn):
            raise TypeError(
                "method must be NeighborhoodAttn or SlidingWindowAttn, whose windows have borders "
                f"to move, got {type(self.method).__name__}; leave the jitter out"
            )

    def at(self, step: int | None) -> NeighborhoodAttn | SlidingWindowAttn:
        """The windows of one step; without a step, those of the inner method."""
        if step is None:
            return self.method
        drawn = Random(f"{self.seed} {step}")
        return replace(self.method, phase=(drawn.randrange(_PHASES), drawn.randrange(_PHASES)))

    def compute(self, inputs: AttentionInputs, position: Position) -> Attended:
        return self.at(position.step).run(inputs, position)
