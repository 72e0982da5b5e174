"""Rotary position embeddings beyond the size on which a model was trained, axis by axis."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from diffaccel.bindings import BINDINGS, UnsupportedModelError, binding_of
from diffaccel.bindings.axes import Axis, Linear, Ntk, Riflex, Yarn

__all__ = ["Axis", "Linear", "Ntk", "Riflex", "Yarn", "scaled_rope"]


def scaled_rope(
    model: Any,
    *,
    frames: Axis | None = None,
    height: Axis | None = None,
    width: Axis | None = None,
) -> AbstractContextManager[None]:
    """Returns a context in which the rotary position embedding of a denoiser is scaled.

    Args:
        model: A transformer whose binding scales rotary positions.
        frames: What happens to the frame axis (in FLUX: the image index); None for nothing.
        height: What happens to rows.
        width: What happens to columns.

    Raises:
        UnsupportedModelError: The model embeds positions in another way.
    """
    binding = binding_of(model)
    if not binding.scales_rope:
        known = " and ".join(name for name, binding in BINDINGS.items() if binding.scales_rope)
        raise UnsupportedModelError(
            f"rotary positions can be scaled in {known}, got {type(model).__name__}; leave them "
            "as they are"
        )
    return binding.scaled_rope(model, (frames, height, width))
