"""How each pipeline family is called: native size, steps, guidance, and recipes beyond that size.

The recipes of the embedded model are measured, see `benchmarks/studies/high_resolution.py`; those
of the other families are reasoned from what was published, as their weights were not at hand.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel.pipelines import embedded
from diffaccel.pipelines.image.preset import MULTIPLE, Preset, reasoned_recipes
from diffaccel.pipelines.image.recipe import AT_ONCE, Recipe, Refinement
from diffaccel.pipelines.redraw.latents import LatentCodec

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
    recipes=reasoned_recipes("sliding-window", 0.4, None),
    passes=2,
    refine_passes=2,
)
# What each pipeline undoes before it decodes. Autoencoders have further settings that some
# pipelines pass over: Kandinsky 5 the shift of the FLUX autoencoder.
_MEANS = ("latents_mean", "latents_std")
_SCALED = LatentCodec(statistics=("scaling_factor",))
_SHIFTED = LatentCodec(statistics=("scaling_factor", "shift_factor"))
_NORMED = LatentCodec(statistics=_MEANS)
_SHIFTED_QUADS = replace(_SHIFTED, arrangement="quads")
_NORMED_QUADS = replace(_NORMED, arrangement="quads")
_NORMED_TOKENS = replace(_NORMED, arrangement="tokens")
_PATCHES = LatentCodec(patches_channels=True)


def _flow(
    native: int, steps: int, text: int, codec: LatentCodec, *, passes: int = 2,
    multiple: int = MULTIPLE, token: int = MULTIPLE, shift: float | None = None,
    **arguments: object,
) -> Preset:  # fmt: skip
    """A flow model that redraws through a codec; its shift grows with the size."""
    return Preset(
        native, steps, reasoned_recipes("rectified", 0.4, "size"), arguments, text=text,
        passes=passes, refine_passes=passes, codec=codec, multiple=multiple,
        token=token, shift=shift,
    )  # fmt: skip


def _diffusion(
    native: int, steps: int, text: int, codec: LatentCodec = _SCALED, **arguments: object
) -> Preset:
    """A model of noise that redraws through a codec; its schedule has no shift."""
    return Preset(
        native, steps, reasoned_recipes("sliding-window", 0.4, None), arguments, text=text,
        passes=2, refine_passes=2, codec=codec,
    )  # fmt: skip


BY_PIPELINE = {
    "FluxPipeline": Preset(
        native=1024,
        steps=28,
        arguments={"guidance_scale": 3.5},
        recipes=reasoned_recipes("rectified", 0.4, "size"),
        text=512,
    ),
    "StableDiffusion3Pipeline": Preset(
        native=1024,
        steps=28,
        arguments={"guidance_scale": 5.0},
        recipes=reasoned_recipes("rectified", 0.4, "size"),
        text=333,
        passes=2,
        refine_passes=2,
    ),
    "QwenImagePipeline": Preset(
        native=1328,
        steps=40,
        arguments={"negative_prompt": " ", "true_cfg_scale": 4.0},
        recipes=reasoned_recipes("rectified", 0.4, "size"),
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
        recipes=reasoned_recipes("sliding-window", 0.35, None),
        passes=2,
        refine_passes=2,
    ),
    "StableDiffusionPipeline": Preset(
        native=512,
        steps=30,
        arguments={"guidance_scale": 7.5},
        recipes=reasoned_recipes("sliding-window", 0.4, None),
        passes=2,
        refine_passes=2,
    ),
    # The others start from a picture by `diffaccel.pipelines.redraw`. Steps and guidance are the
    # pipelines' own defaults; arguments are what differs from them. Resolution binning and the
    # sizes that HiDream and Kandinsky 5 choose would bring every picture back to native size.
    # Text that is not padded counts as a long sentence, 64 tokens.
    "AuraFlowPipeline": _flow(1024, 50, 256, _SCALED),
    "BriaPipeline": _flow(1024, 30, 128, _SHIFTED_QUADS),
    # Not padded; its prompts are descriptions in JSON of about this length.
    "BriaFiboPipeline": _flow(1024, 30, 1024, _NORMED_TOKENS),
    "ChromaPipeline": _flow(1024, 35, 512, _SHIFTED_QUADS),
    "CogView3PlusPipeline": _diffusion(1024, 50, 224),
    "CogView4Pipeline": _flow(1024, 50, 64, _SCALED),
    # The shift that they compute at 1024 x 1024 for the 29 steps of a redrawing.
    "Flux2KleinPipeline": _flow(1024, 50, 512, _PATCHES, shift=8.6),
    "Flux2Pipeline": _flow(1024, 50, 512, _PATCHES, passes=1, shift=8.6),
    # Only words to be written are text; a token of the prior is 32 pixels wide.
    "GlmImagePipeline": _flow(1024, 50, 16, _NORMED, multiple=32),
    "HiDreamImagePipeline": _flow(1024, 50, 384, _SHIFTED),
    "HunyuanDiTPipeline": _diffusion(1024, 50, 0, use_resolution_binning=False),
    "HunyuanImagePipeline": _flow(2048, 50, 1000 + 128, _SCALED, multiple=32, token=32),
    "Kandinsky5T2IPipeline": _flow(1024, 50, 0, replace(_SCALED, arrangement="channels-last")),
    "KolorsPipeline": _diffusion(1024, 50, 0),
    "Krea2Pipeline": _flow(1024, 28, 512, _NORMED_QUADS),
    # Its rewriting draws another prompt at each stage.
    "LongCatImagePipeline": _flow(1024, 50, 512, _SHIFTED_QUADS, enable_prompt_rewrite=False),
    # Padding is cut; a long sentence and the system prompt remain.
    "Lumina2Pipeline": _flow(1024, 30, 100, _SHIFTED),
    "LuminaPipeline": _flow(1024, 30, 0, _SCALED),
    "NucleusMoEImagePipeline": _flow(1024, 50, 64, _NORMED_QUADS),
    "OvisImagePipeline": _flow(1024, 50, 256, _SHIFTED_QUADS),
    # With the deep compression autoencoder; for that of FLUX see `preset_for`.
    "PRXPipeline": _flow(
        512, 28, 256, _SHIFTED, multiple=32, token=32, use_resolution_binning=False
    ),
    "PixArtAlphaPipeline": _diffusion(1024, 20, 0, use_resolution_binning=False),
    "PixArtSigmaPipeline": _diffusion(1024, 20, 0, use_resolution_binning=False),
    # It takes an even number of tokens per side.
    "QwenImage21Pipeline": _flow(1024, 40, 64, _NORMED_TOKENS, passes=1, multiple=32),
    "ZImagePipeline": _flow(1024, 50, 64, _SHIFTED),
}
SUPPORTED = tuple(BY_PIPELINE)
SUPPORTED_VIDEO = (
    "WanPipeline",
    "AnimateDiffPipeline",
    "AnyFlowPipeline",
    "CogVideoXPipeline",
    "Cosmos2_5_PredictBasePipeline",
    "CosmosTextToWorldPipeline",
    "EasyAnimatePipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideoPipeline",
    "Kandinsky5T2VPipeline",
    "LTX2Pipeline",
    "LTXPipeline",
    "MochiPipeline",
    "MotifVideoPipeline",
    "SkyReelsV2Pipeline",
)


def denoiser(pipe: Any) -> Any:
    """Returns the denoiser of a text-to-image pipeline."""
    return getattr(pipe, "unet", None) or pipe.transformer


def preset_for(pipe: Any, source: str | Path) -> Preset:
    """Returns the preset of a loaded pipeline, native size taken from the model where it says it.

    Args:
        pipe: A pipeline whose class is in `SUPPORTED`.
        source: What it was loaded from; the embedded model has a preset of its own.
    """
    config, scale = denoiser(pipe).config, getattr(pipe, "vae_scale_factor", 1)
    preset = named_preset(type(pipe).__name__, source, config.get("sample_size"), scale)
    if type(pipe).__name__ == "PRXPipeline":  # of several sizes, with one of two autoencoders
        token = scale * config.patch_size
        return replace(preset, native=pipe.default_sample_size, multiple=token, token=token)
    return preset


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
    if isinstance(sample_size, int) and class_name.startswith(("StableDiffusion", "PixArt")):
        return replace(preset, native=sample_size * vae_scale)
    return preset
