"""What a preset holds: how a pipeline family is called, and its ways beyond native size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diffaccel.pipelines.image.recipe import AT_ONCE, Recipe, Refinement, Shift
from diffaccel.pipelines.redraw.latents import LatentCodec

MULTIPLE = 16
"""Pixels per token and axis in most latent models, of which sides are multiples."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Calling conventions of one pipeline family.

    Attributes:
        native: Side in pixels of the square picture that the model was trained on.
        steps: Denoising steps at native size.
        recipes: Ways beyond native size, by the names in `IMAGE_RECIPES`.
        arguments: Further arguments of every call.
        refine_arguments: What differs from `arguments` in stages that start from a picture.
        recipe: Name of the default one.
        text: Text tokens that join the picture's in self-attention, as the pipeline pads them;
            of pipelines that do not pad, those of a long sentence.
        passes: Rows that the denoiser gets per step and picture: 2 under classifier-free guidance.
        refine_passes: The same in stages that start from a picture.
        codec: How the pipeline holds its latents: by it a picture is redrawn, otherwise by the
            pipeline's image-to-image twin.
        multiple: Pixels of which both sides are multiples.
        token: Pixels per token and axis.
        shift: Of the noise schedule at native size, where the pipeline computes one that the
            scheduler's settings do not tell.
    """

    native: int
    steps: int
    recipes: dict[str, Recipe]
    arguments: dict[str, object] = field(default_factory=dict)
    refine_arguments: dict[str, object] = field(default_factory=dict)
    recipe: str = "cascade"
    text: int = 0
    passes: int = 1
    refine_passes: int = 1
    codec: LatentCodec | None = None
    multiple: int = MULTIPLE
    token: int = MULTIPLE
    shift: float | None = None

    @property
    def refinement(self) -> Refinement:
        """Stages and switches of the default recipe."""
        return self.recipes[self.recipe].refinement

    @property
    def method(self) -> str:
        """Command-line name of the default recipe's attention."""
        return self.recipes[self.recipe].method

    @property
    def knobs(self) -> dict[str, object]:
        """Values of knobs of the default recipe."""
        return self.recipes[self.recipe].knobs


def reasoned_recipes(method: str, strength: float, shift: Shift) -> dict[str, Recipe]:
    """The recipes of a model whose weights have not been measured here.

    Reasoned from publications. One jump re-noises with strength 0.7 (FreeSwim, Wu et al., 2025,
    https://arxiv.org/abs/2511.14712) under a shift of about 6 to 12 at 2x to 4x; guidance decides
    all low frequencies at first and falls along a cosine (I-Max, Du et al., 2024,
    https://arxiv.org/abs/2410.07536); the cascade doubles the sides and redoes less each time
    (HiFlow, Bu et al., 2025, https://arxiv.org/abs/2504.06232).
    """
    jump = Refinement(steps=20, strength=0.7, max_upscale=AT_ONCE, shift=shift)
    cascade = Refinement(steps=12, strength=strength, max_upscale=2.0, guidance=1.0)
    return {
        "direct": Recipe(replace(jump, direct=True), "full"),
        "window": Recipe(jump, "sliding-window"),
        "guided": Recipe(replace(jump, guidance=1.0), "sliding-window"),
        "cascade": Recipe(cascade, method),
    }
