"""Embeddings of a negative prompt, as the model of a pipeline is called with them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.errors import ModelError
from diffaccel.guidance.normalized.config import NormalizedAttention

MASKS = (
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "encoder_mask",
    "attention_mask",
)
"""Names that masks of the text have."""


@dataclass(frozen=True, slots=True)
class NegativePrompt:
    """Embeddings (1, T, C) of the tokens that count, without padding.

    Args:
        embeddings: Of the text.
    """

    embeddings: Tensor

    @property
    def length(self) -> int:
        """T."""
        return self.embeddings.shape[1]

    def replaced_in(self, arguments: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
        """Returns the text arguments of a model call with this prompt instead.

        Args:
            arguments: Of the call, by name.
            rows: Size of the batch.
            length: To which the text is filled up with zeros, at least T.

        Returns:
            `encoder_hidden_states` and, where the call has one, its mask.
        """
        present = arguments["encoder_hidden_states"]
        if self.embeddings.shape[-1] != present.shape[-1]:
            raise ModelError(
                f"a negative prompt must have {present.shape[-1]} channels, as the text that the "
                f"model gets, and has {self.embeddings.shape[-1]} as the pipeline encodes it; "
                "pass what the model should get as a tensor"
            )
        text = filled_up(self.embeddings.to(present.device, present.dtype), length)
        replaced = {"encoder_hidden_states": text.expand(rows, -1, -1)}
        for name, mask in masks_of(arguments).items():
            own = (torch.arange(length, device=mask.device) < self.length).to(mask.dtype)
            replaced[name] = own.expand(rows, -1)
        return replaced


def masks_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the masks (B, T) of the text in a model call, by name."""
    text = arguments["encoder_hidden_states"].shape[:2]
    found = {name: arguments.get(name) for name in MASKS}
    return {name: mask for name, mask in found.items() if mask is not None and mask.shape == text}


def lengthened(arguments: dict[str, Any], length: int) -> dict[str, Any]:
    """Returns the text arguments of a model call, filled up with masked zeros to a length."""
    longer = {"encoder_hidden_states": filled_up(arguments["encoder_hidden_states"], length)}
    if arguments.get("txt_ids") is not None:
        longer["txt_ids"] = filled_up(arguments["txt_ids"], length)
    for name, mask in masks_of(arguments).items():
        longer[name] = filled_up(mask[..., None], length)[..., 0]
    return longer


def filled_up(tokens: Tensor, length: int) -> Tensor:
    """Appends zeros to (..., T, C) up to a length."""
    missing = length - tokens.shape[-2]
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


@torch.no_grad()
def negative_prompt_of(pipe: Any, method: NormalizedAttention) -> NegativePrompt:
    """Encodes the negative prompt with the pipeline's own encoders, or takes what was given."""
    given = method.negative_prompt
    if isinstance(given, Tensor):
        return _without_padding(given, method.negative_mask)
    if not hasattr(pipe, "encode_prompt"):
        raise ModelError(
            f"NormalizedAttention needs a pipeline with prompts, and {type(pipe).__name__} has "
            "none; use a perturbation"
        )
    known = {
        "prompt": given,
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    accepted = inspect.signature(pipe.encode_prompt).parameters
    called = inspect.signature(type(pipe).__call__).parameters
    if "max_sequence_length" in called:  # encode_prompt has another default in some pipelines
        known["max_sequence_length"] = called["max_sequence_length"].default
    results = pipe.encode_prompt(**{k: v for k, v in known.items() if k in accepted})
    embeddings, *others = results
    masks = [
        x
        for x in others
        if isinstance(x, Tensor) and not x.is_floating_point() and x.shape == embeddings.shape[:2]
    ]
    return _without_padding(embeddings, masks[0] if masks else None)


def _without_padding(embeddings: Tensor, mask: Tensor | None) -> NegativePrompt:
    if mask is None:
        return NegativePrompt(embeddings)
    if mask.shape != (1, embeddings.shape[1]) or not mask.any():
        raise ValueError(
            "negative_mask must be (1, T) with at least one token that counts, got "
            f"{tuple(mask.shape)} for embeddings {tuple(embeddings.shape)}"
        )
    return NegativePrompt(embeddings[:, mask[0].bool().to(embeddings.device)])
