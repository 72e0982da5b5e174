"""Guidance by comparison: away from what a model predicts when a part of it is damaged.

With the prediction c for the prompt, u for the empty prompt and p for the prompt with the damaged
model, the sampler gets  c + w (c - p),  with classifier-free guidance  u + g (c - u) + w (c - p).

The difference w (c - p) is added to every prediction of a step. Whatever combination the pipeline
then takes, as long as its weights add up to 1, holds the difference exactly once: so one formula
serves every pipeline, whether it asks for u and c in one call or in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffaccel.attach.attachment import denoisers
from diffaccel.attach.running import refuse_running
from diffaccel.bindings import binding_of
from diffaccel.errors import ModelError
from diffaccel.guidance.guide import GuidanceState, Guide, guides_of
from diffaccel.guidance.normalized.config import NormalizedAttention
from diffaccel.guidance.normalized.guides import normalized_guide
from diffaccel.guidance.perturb.damage import Perturbation
from diffaccel.guidance.perturb.difference import DifferenceGuide
from diffaccel.guidance.prompt_rows import check_tells_rows

INSTEAD = "use one of HeadPerturbation, SkipLayers, PermuteTokens, NormalizedAttention"


@dataclass(frozen=True, slots=True)
class GuidanceReport:
    """What guidance did in the latest run.

    Args:
        perturbation: repr of what was damaged.
        scale: Strength w.
        steps: Denoising steps seen.
        guided_steps: Steps that were guided.
        extra_forwards: Additional forwards, parts of one counted by the stages that ran. A
            forward is one of the rows of the prompt alone, without those of classifier-free
            guidance.
        rerun: Share of the model's stages that an additional forward ran; caches leave nothing
            to be shared, so that it is 1 beside them. What to expect before the first run.
        seconds: Wall-clock time of the additional forwards; None on devices that run ahead.
    """

    perturbation: str
    scale: float
    steps: int
    guided_steps: int
    extra_forwards: float
    rerun: float
    seconds: float | None

    def __str__(self) -> str:
        spent = "" if self.seconds is None else f", {self.seconds:.2f} s"
        return (
            f"guidance by {self.perturbation}, scale {self.scale:g}: {self.guided_steps} of "
            f"{self.steps} steps, {self.extra_forwards:.2f} extra forwards "
            f"({self.rerun:.0%} of the stages each){spent}"
        )


class GuidanceAttachment:
    """Guidance that was set on a pipeline. A context manager: removed on exit."""

    def __init__(self, pipe: DiffusionPipeline, state: GuidanceState, guides: list[Guide]) -> None:
        self._pipe = pipe
        self._state = state
        self._guides = guides

    def report(self) -> GuidanceReport:
        """Returns what the guidance did in the latest run."""
        first, state = self._guides[0], self._state
        return GuidanceReport(
            perturbation=repr(first.perturbation),
            scale=first.scale,
            steps=len(state.steps),
            guided_steps=len(state.guided),
            extra_forwards=state.extra_forwards,
            rerun=state.extra_forwards / state.forwards if state.forwards else first.rerun,
            seconds=state.seconds,
        )

    def remove(self) -> None:
        """Takes the guidance off; does nothing where that was done already.

        Raises:
            ModelError: A denoiser, or a pipeline that holds it, runs in another thread.
        """
        refuse_running(guide.model for guide in self._guides if guide.model is not None)
        for guide in self._guides:
            guide.remove()
        if getattr(self._pipe, "_diffaccel_guidance", None) is self:
            del self._pipe._diffaccel_guidance

    def __enter__(self) -> GuidanceAttachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def set_guidance(
    pipe: DiffusionPipeline,
    perturbation: Perturbation | NormalizedAttention,
    *,
    scale: float = 3.0,
    start: float = 0.0,
    stop: float = 1.0,
) -> GuidanceAttachment:
    """Steers a pipeline away from what its model predicts when a part of it is damaged.

    Works with and without classifier-free guidance, beside any method of `set_attn_processor`.
    Costs one more forward of the prompt's rows per guided step; what lies before the first damaged
    layer is taken from the forward that the pipeline does anyway. Guidance that was set before is
    replaced. Guidance acts on the denoisers, in whichever pipeline they run (`from_pipe`,
    copies): the one that runs tells its steps and which rows of a batch hold the prompt.

    Args:
        pipe: A stock diffusers pipeline.
        perturbation: What is damaged: `HeadPerturbation` (PAG, SoftPAG, SEG), `SkipLayers` (SLG,
            STG), `PermuteTokens` (TPG), or `NormalizedAttention` (NAG), which follows another
            formula.
        scale: w, at least 0; 0 changes nothing and costs nothing.
        start: Share of the denoising steps before which nothing is guided, 0 to 1.
        stop: Share of the steps from which on nothing is guided.

    Returns:
        The attachment: reports, removes, works as a context manager.

    Raises:
        TypeError: The perturbation is none, or the target is not a pipeline.
        ValueError: A number is out of range, or the model has no such layer or head.
        UnsupportedModelError: No binding knows the model.
        ModelError: The pipeline does not tell which rows of a batch hold the prompt, the processor
            of a layer computes its attention in another way than by SDPA, or a denoiser runs in
            another thread.
    """
    if not isinstance(perturbation, Perturbation | NormalizedAttention):
        raise TypeError(f"a perturbation is needed, got {type(perturbation).__name__}; {INSTEAD}")
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"guidance needs a diffusers pipeline, got {type(pipe).__name__}; pass the pipeline "
            "itself, which knows the prompts of a batch"
        )
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0, got scale={scale}")
    if not 0.0 <= start <= stop <= 1.0:
        raise ValueError(f"0 <= start <= stop <= 1 must hold, got start={start}, stop={stop}")
    models = denoisers(pipe)
    for model in models.values():
        reason = binding_of(model).unguided
        if reason:
            raise ModelError(
                f"{type(model).__name__} cannot be guided: {reason}; use set_attn_processor alone"
            )
    if "unconditional_transformer" in models:
        raise ModelError(
            "guidance needs a model that predicts with and without the prompt, "
            f"{type(pipe).__name__} has one for each; use the pipeline's own guidance_scale"
        )
    if any(binding_of(model).batches_prompts for model in models.values()):
        check_tells_rows(pipe)
    for name, model in models.items():
        if not isinstance(perturbation, NormalizedAttention):
            check_layers(name, model, perturbation)
    restore_guidance(pipe)  # refuses denoisers that run in another thread
    state = GuidanceState(pipe, (start, stop))
    build: Any = (
        normalized_guide if isinstance(perturbation, NormalizedAttention) else DifferenceGuide
    )
    guides: list[Guide] = []
    try:
        for model in models.values():
            guides.append(build(state, model, perturbation, scale))
    except Exception:  # that one denoiser refuses must not leave another guided
        for guide in guides:
            guide.remove()
        raise
    attachment = GuidanceAttachment(pipe, state, guides)
    pipe._diffaccel_guidance = attachment
    return attachment


def restore_guidance(pipe: DiffusionPipeline) -> None:
    """Takes guidance off the denoisers of a pipeline, whichever pipeline it was set on.

    Raises:
        ModelError: A denoiser, or a pipeline that holds it, runs in another thread.
    """
    models = denoisers(pipe)
    refuse_running(models.values())
    for model in models.values():
        for guide in guides_of(model):
            guide.remove()
    vars(pipe).pop("_diffaccel_guidance", None)


def check_layers(name: str, model: nn.Module, perturbation: Perturbation) -> None:
    """Raises ValueError unless the model has the layers and heads that are to be damaged."""
    layers = binding_of(model).layers(model)
    where = f"{type(model).__name__}{f' ({name})' if name else ''}"
    if not perturbation.touched:
        raise ValueError("the perturbation must name a layer or head to damage, it names none")
    unknown = [index for index in perturbation.touched if index >= len(layers)]
    if unknown:
        raise ValueError(
            f"layers must lie in 0 to {len(layers) - 1} for {where}, got "
            f"{', '.join(map(str, unknown))}"
        )
    for layer, head in getattr(perturbation, "heads", ()):
        module: Any = model.get_submodule(layers[layer].name)
        count = module.heads
        if head >= count:
            raise ValueError(
                f"heads of layer {layer} of {where} must lie in 0 to {count - 1}, got {head}"
            )
