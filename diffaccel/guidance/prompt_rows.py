"""Which rows of a model call hold the prompt, by what the pipeline that runs says of itself."""

from __future__ import annotations

from typing import Any

from diffaccel.errors import ModelError

PROMPT_FIRST = {
    "StableDiffusionInstructPix2PixPipeline": 3,
    "LuminaPipeline": 2,
    "StableCascadePriorPipeline": 2,
    "StableCascadeDecoderPipeline": 2,
}
"""Pipelines whose prompt comes first of several parts of the batch, where they guide."""

UNTOLD = ("DreamLitePipeline",)
"""Pipelines whose batch has two or three parts, by whether they edit, which they do not say."""

SWITCHES = ("do_classifier_free_guidance", "guidance_scale")


class PromptRows:
    """Tells which rows of a batch hold the prompt.

    Pipelines put an empty or negative prompt before it, or not, and say so in a property that
    callbacks may change; what a pipeline does not say is not guessed.
    """

    def __init__(self) -> None:
        self._had_scale: bool | None = None

    def forget_run(self) -> None:
        """Begins a new run."""
        self._had_scale = None

    def of(self, pipe: Any, count: int) -> slice:
        """Returns the rows of the prompt.

        Args:
            pipe: The pipeline that runs; None where the model is called by hand.
            count: Rows of the call.

        Raises:
            ModelError: The pipeline does not tell.
        """
        if pipe is None:
            raise ModelError(
                "guidance cannot tell which rows hold the prompt, since the model is called "
                "outside of a pipeline; call the pipeline, or restore_guidance(pipe) first"
            )
        part, parts = self._part(pipe)
        if count % parts:
            raise ModelError(
                f"guidance cannot tell which rows hold the prompt: {type(pipe).__name__} has "
                f"{parts} parts in a batch and called the model with {count} rows"
            )
        size = count // parts
        return slice(part * size, (part + 1) * size)

    def _part(self, pipe: Any) -> tuple[int, int]:
        """Returns which part of the batch holds the prompt, and how many parts there are."""
        perturbs = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
        if not self._guides(pipe):
            return 0, 1 + perturbs
        first = PROMPT_FIRST.get(type(pipe).__name__)
        return (0, first) if first else (1, 2 + perturbs)

    def _guides(self, pipe: Any) -> bool:
        """Whether the batch has rows of another prompt."""
        if hasattr(type(pipe), "do_classifier_free_guidance"):
            return bool(pipe.do_classifier_free_guidance)
        check_tells_rows(pipe)
        if self._had_scale is None:  # such pipelines ask their scale once, before the first step
            self._had_scale = pipe.guidance_scale > 1.0
        return self._had_scale


def check_tells_rows(pipe: Any) -> None:
    """Refuses pipelines that do not say whether a batch holds another prompt.

    Raises:
        ModelError: The class has no property that does.
    """
    name = type(pipe).__name__
    if name in UNTOLD or not any(hasattr(type(pipe), switch) for switch in SWITCHES):
        raise ModelError(
            f"guidance needs a pipeline that tells which rows of a batch hold the prompt (by "
            f"{' or '.join(SWITCHES)}), {name} does not; use another pipeline"
        )
