"""Attention whose softmax is sharpened for more tokens than a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, prod, sqrt

from diffaccel.errors import check_kinds
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method
from diffaccel.methods.full import FullAttn
from diffaccel.methods.inputs import Attended, AttentionInputs, Position
from diffaccel.methods.wrapping import WrappingMethod


@dataclass(frozen=True, slots=True, repr=False)
class ProportionalAttn(WrappingMethod):
    """Another method with its scores multiplied by sqrt(log(N) / log(N_train)).

    With more tokens the softmax spreads; this keeps its entropy about what the model was trained
    with ("Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis",
    Jin et al., 2023, https://arxiv.org/abs/2306.08645). At N = N_train nothing changes. Methods of
    windows see about as many tokens as in training and do not need it.

    Args:
        method: What is computed.
        train_tokens: N_train, text included. None: the native tokens of the layout plus its text.

    Example:
        >>> pipe.set_attn_processor(ProportionalAttn(RectifiedSpaAttn()))
    """

    method: Method = FullAttn()
    train_tokens: int | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if not isinstance(self.method, Method) or isinstance(self.method, ProportionalAttn):
            raise TypeError(
                "method must be another attention method, got "
                f"{type(self.method).__name__}; pass an instance such as RectifiedSpaAttn()"
            )
        if self.train_tokens is not None and self.train_tokens < 2:
            raise ValueError(
                f"train_tokens must be None or at least 2, got train_tokens={self.train_tokens}"
            )

    def temperature(self, layout: TokenLayout) -> float:
        """Factor on the scores.

        Raises:
            ValueError: If neither the method nor the layout says how many tokens were trained.
        """
        trained = self.train_tokens
        if trained is None:
            if layout.native is None:
                raise ValueError(
                    "train_tokens=None takes the size on which the model was trained, which this "
                    "layout does not tell; pass train_tokens"
                )
            others = layout.length - (layout.visual.length if layout.visual else 0)
            trained = prod(layout.native) + others
        return sqrt(log(max(layout.length, 2)) / log(trained))

    def compute(self, inputs: AttentionInputs, position: Position) -> Attended:
        scale = inputs.scale * self.temperature(inputs.layout)
        return self.method.run(replace(inputs, scale=scale), position)
