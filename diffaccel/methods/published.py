"""Published settings of methods for model families.

Of Rectified SpaAttn, from "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video
Generation" (2025, https://arxiv.org/abs/2511.19835) and the scripts that accompany it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Published:
    """What was published for one model family; the defaults say that nothing was.

    Args:
        drop: Share of visual key blocks that is not computed, or None where unpublished.
        dense_steps: First steps that run dense, one number for each denoiser (expert).
        steps: Denoising steps of the runs for which that was published.
        dense_layers: Number of first layers that run dense.
        last_dense_layers: (n, of): the last n layers run dense, but only in a model with
            exactly `of` attention layers, the one for which this was published.
        first_frame: Whether blocks with first-frame tokens all see each other exactly.
    """

    drop: float | None = None
    dense_steps: tuple[int, ...] = (0,)
    steps: int = 50
    dense_layers: int = 0
    last_dense_layers: tuple[int, int] | None = None
    first_frame: bool = False

    def dense_steps_of(self, expert: int, steps: int | None = None) -> int:
        """Dense steps of one denoiser; one beyond the published ones takes the last value.

        Of a run with fewer `steps` than the published ones at most the published share is dense.
        """
        count = self.dense_steps[min(expert, len(self.dense_steps) - 1)]
        return count if steps is None else min(count, count * steps // self.steps)

    def dense_layers_of(self, num_layers: int) -> tuple[int, ...] | int:
        """Dense layers of a model with `num_layers` attached layers."""
        if self.last_dense_layers is None:
            return self.dense_layers
        count, expected = self.last_dense_layers
        return tuple(range(expected - count, expected)) if num_layers == expected else 0


PUBLISHED: dict[str, Published] = {
    # FLUX.1-dev only: 19 double and 38 single blocks, of which the last 20 stay dense.
    "flux": Published(drop=0.90, last_dense_layers=(20, 57)),
    "hunyuan": Published(drop=0.80),
    "wan2.1-t2v": Published(0.75, dense_steps=(5,), dense_layers=2, first_frame=True),
    "wan2.1-i2v": Published(0.75, dense_layers=2, first_frame=True),
    "wan2.2-t2v": Published(0.85, dense_steps=(3, 1), steps=40, dense_layers=2, first_frame=True),
    "wan2.2-i2v": Published(0.85, steps=40, dense_layers=2, first_frame=True),
    "wan2.2-ti2v": Published(0.75, dense_steps=(5,), dense_layers=2, first_frame=True),
    # The scripts say 0.75; the README says 0.85 for text-to-video, 0.75 for image-to-video.
    "cogvideox": Published(drop=0.75, dense_steps=(5,)),
    "sd3": Published(),
    "qwen": Published(),
    "ltx": Published(),
    "sd15": Published(),
    "sdxl": Published(),
    "flux2": Published(),
    "flux3": Published(),
    "chroma": Published(),
    "krea2": Published(),
    "longcat-image": Published(),
    "ovis-image": Published(),
    "bria": Published(),
    "bria-fibo": Published(),
    "bria-fibo2": Published(),
    "auraflow": Published(),
    "ernie-image": Published(),
    "glm-image": Published(),
    "ideogram4": Published(),
    "omnigen": Published(),
    "dreamlite": Published(),
    "z-image": Published(),
    "lumina2": Published(),
    "hunyuan-image": Published(),
    "qwen-image-2.1": Published(),
    "hidream": Published(),
    "cogview4": Published(),
    "cogview3": Published(),
    "pixart": Published(),
    "hunyuan-dit": Published(),
    "dit": Published(),
    "lumina-next": Published(),
    "prx": Published(),
    "nucleus": Published(),
    "joy-image": Published(),
    "kandinsky3": Published(),
    "amused": Published(),
    "vq-diffusion": Published(),
    "wan-vace": Published(),
    "wan-animate": Published(),
    "skyreels-v2": Published(),
    "chronoedit": Published(),
    "anyflow": Published(),
    "hunyuan-1.5": Published(),
    "framepack": Published(),
    "motif-video": Published(),
    "kandinsky-5": Published(),
    "kandinsky-6": Published(),
    "helios": Published(),
    "ltx2": Published(),
    "minimax-h3": Published(),
    "cosmos3": Published(),
    "stable-cascade": Published(),
    "i2vgen-xl": Published(),
    "modelscope": Published(),
    "svd": Published(),
    "animatediff": Published(),
    "consisid": Published(),
    "latte": Published(),
    "allegro": Published(),
    "easyanimate": Published(),
    "mochi": Published(),
    "cosmos": Published(),
    "other": Published(),  # models of which nobody said more
}


NEIGHBORHOODS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | int]] = {
    "flux-4k": ((80, 80), (16, 16)),
    "flux-4k-sliding": ((80, 80), 1),
    "hunyuan-720p": ((18, 24, 24), (16, 8, 8)),
    "hunyuan-720p-sliding": ((18, 24, 24), 1),
}
"""Kernel size and stride of neighborhood attention, from "Generalized Neighborhood Attention"
(Hassani et al., 2025, https://arxiv.org/abs/2504.16922) and the documentation of NATTEN."""


class AgentKnobs(NamedTuple):
    """Knobs of agent attention that suit one model family."""

    agents: str
    scale_power: float
    shortcut: float


_ROTARY = AgentKnobs("middle", 1.0, 0.0)
_AGENTSD = AgentKnobs("pool", 0.3, 0.075)

AGENTS: dict[str, AgentKnobs] = {
    **dict.fromkeys(PUBLISHED, _ROTARY),
    "sd15": _AGENTSD,
    "sdxl": _AGENTSD,
    "sd3": AgentKnobs("pool", 1.0, 0.0),
    "auraflow": AgentKnobs("pool", 1.0, 0.0),
    "dreamlite": AgentKnobs("pool", 1.0, 0.0),
}
"""The constants of the U-Nets are those of AgentSD (https://github.com/LeapLabTHU/Agent-Attention),
published for SD 1.5. The others are own choices: rotated queries are not averaged."""


def published(family: str) -> Published:
    """Looks a model family up; raises ValueError for an unknown name."""
    if family not in PUBLISHED:
        raise ValueError(
            f"family must be one of {', '.join(sorted(PUBLISHED))}, got {family=}; "
            "a method also works without a family: set dense_steps and dense_layers yourself"
        )
    return PUBLISHED[family]
