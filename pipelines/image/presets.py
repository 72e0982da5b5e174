"""How each pipeline family is called: native size, steps, guidance, and recipes beyond that size.

The recipes of the embedded model are measured, see `benchmarks/studies/high_resolution.py`; those
of the other families are reasoned from what was published, as their weights were not at hand.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffaccel.pipelines import embedded
from diffaccel.pipelines.image.recipe import AT_ONCE, Recipe, Refinement, Shift
from diffaccel.pipelines.redraw.latents import LatentCodec

IMAGE_RECIPES: dict[str, str] = {
    "direct": "at full size at once",
    "window": "one jump from the native sample, with windows alone",
    "guided": "the same under the low frequencies of the native sample",
    "cascade": "guided, in stages that at most double the sides; the default",
}
"""Ways beyond native size, as `--recipe` names them."""


MULTIPLE = 16
"""Pixels per token and axis in most latent models."""


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
            for Qwen-Image, which does not pad, those of a long sentence.
        passes: Rows that the denoiser gets per step and picture: 2 under classifier-free guidance.
        refine_passes: The same in stages that start from a picture.
        codec: How the pipeline holds its latents, where it has no image-to-image twin by which
            a picture could be redrawn.
        multiple: Pixels per token and axis.
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


def _recipes(method: str, strength: float, shift: Shift) -> dict[str, Recipe]:
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


# 16 tokens are the 256 pixels that it was trained on. Attending to more, even to everything,
# makes worse pictures: it has never seen tokens further apart. Without a window, a floor on the
# attention mass would keep a third of all blocks, as attention is diffuse far above native size.
_EMBEDDED_KNOBS = {
    "kernel_size": 16,
    "window": 16,
    "drop": 0.9,
    "p_remain": 0.0,
    "correction": "centroids",
}
_EMBEDDED_JUMP = Refinement(steps=8, strength=0.5, max_upscale=AT_ONCE)
EMBEDDED = Preset(
    native=256,
    steps=20,
    arguments={"negative_prompt": "", "true_cfg_scale": 3.0, "max_sequence_length": 32},
    refine_arguments={"true_cfg_scale": 1.0},
    recipes={
        "direct": Recipe(replace(_EMBEDDED_JUMP, direct=True), "full", _EMBEDDED_KNOBS),
        "window": Recipe(_EMBEDDED_JUMP, "neighborhood", _EMBEDDED_KNOBS),
        "guided": Recipe(replace(_EMBEDDED_JUMP, guidance=1.0), "neighborhood", _EMBEDDED_KNOBS),
        # Guidance brings refined pictures 1 dB nearer to the true drawing at this strength.
        "cascade": Recipe(
            Refinement(steps=4, strength=0.25, max_upscale=2.0, guidance=1.0),
            "neighborhood",
            _EMBEDDED_KNOBS,
        ),
    },
    text=32,
    passes=2,
)
# Recipes reasoned; looked at up to 1024x768, not compared.
EMBEDDED_UNET = Preset(
    native=256,
    steps=20,
    arguments={"guidance_scale": 3.0, "negative_prompt": ""},
    recipes=_recipes("sliding-window", 0.4, None),
    passes=2,
    refine_passes=2,
)
BY_PIPELINE = {
    "FluxPipeline": Preset(
        native=1024,
        steps=28,
        arguments={"guidance_scale": 3.5},
        recipes=_recipes("rectified", 0.4, "size"),
        text=512,
    ),
    "StableDiffusion3Pipeline": Preset(
        native=1024,
        steps=28,
        arguments={"guidance_scale": 5.0},
        recipes=_recipes("rectified", 0.4, "size"),
        text=333,
        passes=2,
        refine_passes=2,
    ),
    "QwenImagePipeline": Preset(
        native=1328,
        steps=40,
        arguments={"negative_prompt": " ", "true_cfg_scale": 4.0},
        recipes=_recipes("rectified", 0.4, "size"),
        text=64,
        passes=2,
        refine_passes=2,
    ),
    # U-Nets: windows of native size at every level, as HiDiffusion (Zhang et al., 2023,
    # https://arxiv.org/abs/2311.17528) does at the topmost; the noise schedule has no shift.
    "StableDiffusionXLPipeline": Preset(
        native=1024,
        steps=30,
        arguments={"guidance_scale": 6.0},
        recipes=_recipes("sliding-window", 0.35, None),
        passes=2,
        refine_passes=2,
    ),
    "StableDiffusionPipeline": Preset(
        native=512,
        steps=30,
        arguments={"guidance_scale": 7.5},
        recipes=_recipes("sliding-window", 0.4, None),
        passes=2,
        refine_passes=2,
    ),
}
SUPPORTED = tuple(BY_PIPELINE)
SUPPORTED_VIDEO = ("WanPipeline",)


def denoiser(pipe: Any) -> Any:
    """Returns the denoiser of a text-to-image pipeline."""
    return getattr(pipe, "unet", None) or pipe.transformer


def preset_for(pipe: Any, source: str | Path) -> Preset:
    """Returns the preset of a loaded pipeline, native size taken from the model where it says it.

    Args:
        pipe: A pipeline whose class is in `SUPPORTED`.
        source: What it was loaded from; the embedded model has a preset of its own.
    """
    sample_size = denoiser(pipe).config.get("sample_size")
    return named_preset(
        type(pipe).__name__, source, sample_size, getattr(pipe, "vae_scale_factor", 1)
    )


def named_preset(
    class_name: str, source: str | Path, sample_size: int | None, vae_scale: int
) -> Preset:
    """Returns the preset of a pipeline class.

    Args:
        class_name: One of `SUPPORTED`.
        source: What it comes from; the embedded models have presets of their own.
        sample_size: Side of the native latents, where the denoiser says it.
        vae_scale: Pixels per latent element and axis.
    """
    ours = {
        embedded.EMBEDDED_IMAGE.resolve(): EMBEDDED,
        embedded.EMBEDDED_UNET.resolve(): EMBEDDED_UNET,
    }
    own = ours.get(Path(source).resolve())
    if own is not None:
        return own
    preset = BY_PIPELINE[class_name]
    if isinstance(sample_size, int) and class_name.startswith("StableDiffusion"):
        return replace(preset, native=sample_size * vae_scale)
    return preset
