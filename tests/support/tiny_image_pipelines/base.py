"""What tiny image pipelines share: prompts as random embeddings, and how they are put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from tiny_models import MODELS
from tiny_models.base import noise
from torch import Tensor

Flow = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass
class TinyImagePipeline:
    """A pipeline with random weights, and how it is called.

    Args:
        pipe: The pipeline.
        told: The prompt and whatever else a call of it needs, but for size, steps and generator.
        prompt: Where it must be text.
        native: Side in pixels that counts as native.
        size: (width, height) in pixels of about twice that side.
    """

    pipe: Any
    told: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    native: int = 64
    size: tuple[int, int] = (160, 96)


Builder = Callable[[], TinyImagePipeline]


def denoiser(name: str) -> Any:
    """The tiny denoiser of that class."""
    return MODELS[name]().model


def assembled(pipeline_class: Any, scheduler: Any, **components: Any) -> Any:
    """A pipeline whose other components are missing."""
    accepted = inspect.signature(pipeline_class.__init__).parameters
    missing = {
        name: None
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and name != "self"
    }
    pipe = pipeline_class(**{**missing, **components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(
    *shape: int, mask: str | None = None, dtype: torch.dtype = torch.long
) -> dict[str, Tensor]:
    """Embeddings of a prompt and a negative one, with masks where they have a name.

    Args:
        shape: (tokens, ..., width).
        mask: Name of the mask of the prompt.
        dtype: Of the masks, as the pipeline's text encoding gives them.
    """
    told = {
        "prompt_embeds": noise(1, *shape, seed=2),
        "negative_prompt_embeds": noise(1, *shape, seed=3),
    }
    if mask:
        valid = torch.ones(1, shape[0], dtype=dtype)
        told |= {mask: valid, f"negative_{mask}": valid}
    return told
