"""How each pipeline family is called: native size, steps, guidance, refinement."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import DiffusionPipeline


@dataclass(frozen=True, slots=True)
class Refinement:
    """How a picture is carried from one size to the next (SDEdit, Meng et al., 2021,
    https://arxiv.org/abs/2108.01073): upscaled, noised part of the way, denoised.

    Attributes:
        steps: Denoising steps of each stage.
        strength: Share of the noise schedule that is redone, in (0, 1]. More adds detail and
            may change content.
        max_upscale: Largest factor per stage and axis; larger jumps pass through sizes between.
        guidance: Share of the low frequencies that the smaller picture decides at the first step,
            0 to 1, falling to nothing; for flow models (FLUX, SD3). See
            `diffaccel.pipelines.low_frequency`.
        guidance_levels: Low frequencies are means over 2 ** this many latent elements and axis.
    """

    steps: int
    strength: float
    max_upscale: float = 4.0
    guidance: float = 0.0
    guidance_levels: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.guidance <= 1.0 or self.guidance_levels < 1:
            raise ValueError(
                "guidance must lie in 0 to 1 and guidance_levels be at least 1, got "
                f"guidance={self.guidance}, guidance_levels={self.guidance_levels}"
            )


@dataclass(frozen=True, slots=True)
class Preset:
    """Calling conventions of one pipeline family.

    Attributes:
        native: Side in pixels of the square picture that the model was trained on.
        steps: Denoising steps at native size.
        arguments: Further arguments of every call.
        refine_arguments: What differs from `arguments` above native size.
        refinement: How to go above native size.
        method: Command-line name of the attention method above native size.
        knobs: Values of the method's knobs that suit this model better than the general
            defaults; knobs that a method lacks are passed over.
    """

    native: int
    steps: int
    refinement: Refinement
    arguments: dict[str, object] = field(default_factory=dict)
    refine_arguments: dict[str, object] = field(default_factory=dict)
    method: str = "rectified"
    knobs: dict[str, object] = field(default_factory=dict)


EMBEDDED = Preset(
    native=256,
    steps=20,
    arguments={"negative_prompt": "", "true_cfg_scale": 3.0, "max_sequence_length": 32},
    refine_arguments={"true_cfg_scale": 1.0},
    # Guidance brings refined pictures 1 dB nearer to the true drawing at this strength.
    refinement=Refinement(steps=4, strength=0.25, max_upscale=2.0, guidance=1.0),
    # 16 tokens are the 256 pixels that it was trained on. Attending to more, even to everything,
    # makes worse pictures: it has never seen tokens further apart.
    method="neighborhood",
    # A floor on the attention mass would keep a third of all blocks, as attention is diffuse far
    # above native size.
    knobs={
        "kernel_size": 16,
        "window": 16,
        "drop": 0.9,
        "p_remain": 0.0,
        "correction": "centroids",
    },
)
BY_PIPELINE = {
    "FluxPipeline": Preset(
        native=1024,
        steps=28,
        arguments={"guidance_scale": 3.5},
        refinement=Refinement(steps=12, strength=0.4, max_upscale=2.0),
    ),
    "StableDiffusion3Pipeline": Preset(
        native=1024,
        steps=28,
        arguments={"guidance_scale": 5.0},
        refinement=Refinement(steps=12, strength=0.4, max_upscale=2.0),
    ),
    "QwenImagePipeline": Preset(
        native=1328,
        steps=40,
        arguments={"negative_prompt": " ", "true_cfg_scale": 4.0},
        refinement=Refinement(steps=12, strength=0.4, max_upscale=2.0),
    ),
    "StableDiffusionXLPipeline": Preset(
        native=1024,
        steps=30,
        arguments={"guidance_scale": 6.0},
        refinement=Refinement(steps=12, strength=0.35, max_upscale=2.0),
    ),
    "StableDiffusionPipeline": Preset(
        native=512,
        steps=30,
        arguments={"guidance_scale": 7.5},
        refinement=Refinement(steps=12, strength=0.4, max_upscale=2.0),
    ),
}
SUPPORTED = tuple(BY_PIPELINE)
SUPPORTED_VIDEO = ("WanPipeline",)


def preset_for(pipe: DiffusionPipeline, source: str | Path) -> Preset:
    """Returns the preset of a loaded pipeline, native size taken from the model where it says it.

    Args:
        pipe: A pipeline whose class is in `SUPPORTED`.
        source: What it was loaded from; the embedded model has a preset of its own.
    """
    from diffaccel.pipelines.loading import EMBEDDED_IMAGE

    if Path(source) == EMBEDDED_IMAGE:
        return EMBEDDED
    preset = BY_PIPELINE[type(pipe).__name__]
    declared = getattr(pipe, "default_sample_size", None)
    if declared and type(pipe).__name__.startswith("StableDiffusion"):
        return replace(preset, native=declared * pipe.vae_scale_factor)
    return preset
