"""What methods of visual tokens share: text stays exact, the visual rows are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from diffaccel.layout import TokenLayout
from diffaccel.methods.base import ScheduledMethod
from diffaccel.methods.inputs import (
    GRADIENTS_NEEDED,
    Attended,
    AttentionInputs,
    Position,
    need_gradients,
)

COMPUTED_DENSELY = "the method computes this shape densely"


class Exactness(NamedTuple):
    """How exactly visual queries were answered.

    Args:
        kept: Share of the pairs of visual tokens that was computed exactly.
        error: Relative error of the output as measured on sampled rows, 0-dim fp32; None where
            nobody measured.
        why_dense: Why they were answered densely, "" where they were not.
    """

    kept: Tensor | float
    error: Tensor | None = None
    why_dense: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class VisualMethod(ScheduledMethod):
    """Text and condition queries run dense over everything; visual queries are the subclass's."""

    def compute(self, inputs: AttentionInputs, position: Position) -> Attended:
        query, layout = inputs.query, inputs.layout
        if need_gradients(query, inputs.key, inputs.value):
            return Attended(inputs.dense(), 1.0, GRADIENTS_NEEDED)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for rows in layout.exact_slices if inputs.asking is None else inputs.asking:
            output[:, rows] = inputs.dense_rows(rows)
        kept = self.attend_visual(inputs, position, output[:, layout.visual_slice])
        if isinstance(kept, Exactness):
            return Attended(output, total_density(kept.kept, layout), kept.why_dense, kept.error)
        return Attended(output, total_density(kept, layout))

    def attend_visual(
        self, inputs: AttentionInputs, position: Position, out: Tensor
    ) -> Tensor | float | Exactness:
        """Attends with the visual queries.

        Args:
            inputs: The whole call.
            position: Where it stands.
            out: (B, N, H, D), the visual rows of the output, which are to be written.

        Returns:
            Share of the pairs of visual tokens that was computed exactly, alone or with more
            that is known.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement attend_visual")


@overload
def total_density(kept: float, layout: TokenLayout) -> float: ...
@overload
def total_density(kept: Tensor | float, layout: TokenLayout) -> Tensor | float: ...
def total_density(kept: Tensor | float, layout: TokenLayout) -> Tensor | float:
    """Share of all query-key pairs, if this share of the visual pairs is computed."""
    return 1.0 - (1.0 - kept) * (layout.visual.length / layout.length) ** 2
