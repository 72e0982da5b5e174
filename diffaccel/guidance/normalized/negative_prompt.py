"""Embeddings of a negative prompt, as the model of a pipeline is called with them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.guidance.normalized.config import NormalizedAttention

MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


@dataclass(frozen=True, slots=True)
class NegativePrompt:
    """Embeddings (1, T, C) and, where the pipeline has one, their mask (1, T).

    Args:
        embeddings: Of the text.
        mask: Which of them are words.
    """

    embeddings: Tensor
    mask: Tensor | None = None

    def replaced_in(self, arguments: dict[str, Any], rows: int) -> dict[str, Any]:
        """Returns the text arguments of a model call with this prompt instead.

        Args:
            arguments: Of the call, by name.
            rows: Size of the batch.

        Returns:
            `encoder_hidden_states` and the mask, in the length of those of the call: missing
            tokens are zeros, which pipelines pad with.
        """
        present = arguments["encoder_hidden_states"]
        length = present.shape[1]
        text = _fitted(self.embeddings, length).to(present.device, present.dtype)
        replaced = {"encoder_hidden_states": text.expand(rows, -1, -1)}
        for name in MASKS:
            mask = arguments.get(name)
            if mask is not None:
                own = torch.ones(self.embeddings.shape[:2]) if self.mask is None else self.mask
                fitted = _fitted(own[..., None].float(), length)[..., 0]
                replaced[name] = fitted.to(mask.device, mask.dtype).expand(rows, -1)
        return replaced


@torch.no_grad()
def negative_prompt_of(pipe: Any, method: NormalizedAttention) -> NegativePrompt:
    """Encodes the negative prompt with the pipeline's own encoders, or takes what was given."""
    given = method.negative_prompt
    if isinstance(given, Tensor):
        return NegativePrompt(given, method.negative_mask)
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
    results = pipe.encode_prompt(**{k: v for k, v in known.items() if k in accepted})
    embeddings, *others = results
    masks = [
        x
        for x in others
        if isinstance(x, Tensor) and not x.is_floating_point() and x.shape == embeddings.shape[:2]
    ]
    return NegativePrompt(embeddings, masks[0] if masks else None)


def _fitted(tokens: Tensor, length: int) -> Tensor:
    """Cuts or zero-pads (1, T, C) to a length."""
    return F.pad(tokens[:, :length], (0, 0, 0, max(0, length - tokens.shape[1])))
