"""One attention call of an attached layer, and what may act around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from diffaccel.attach.obstacles import obstacle
from diffaccel.errors import ModelError
from diffaccel.methods.inputs import AttentionInputs

if TYPE_CHECKING:
    from diffaccel.attach.context_parallel import HeadShare
    from diffaccel.attach.seam import AttachedLayer
    from diffaccel.bindings import AttentionLayer
    from diffaccel.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of an attached layer.

    Args:
        attached: The layer that makes it.
        index: How many calls the layer made before, in the same run of its processor.
        query: (B, N, H, D).
        key: (B, M, H, D).
        value: (B, M, H, D).
        mask: As for SDPA: bool or added to the scores, broadcastable to (B, H, N, M), or None.
        scale: Factor on the scores, None for D ** -0.5.
        options: `dropout_p`, `is_causal`, `enable_gqa` where they are not the defaults.
        dispatch: Further arguments of `dispatch_attention_fn` (backend, parallel_config,
            attention_kwargs); None where the layer calls SDPA itself.
        needs_gradients: Whether a backward pass may follow; methods have none.
        share: Which of the layer's heads these are, None for all.
    """

    attached: AttachedLayer
    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    options: dict[str, Any]
    dispatch: dict[str, Any] | None
    needs_gradients: bool = False
    share: HeadShare | None = None

    @property
    def layer(self) -> AttentionLayer:
        """The layer that makes the call."""
        return self.attached.layer

    @property
    def asking(self) -> tuple[slice, ...]:
        """Where the queries lie, if they are a part of the sequence and the keys are all of it.

        The part is the visual tokens, these and the text, these and all that follows (AnyFlow's
        padding) or, where text attends to itself apart, all but the text that comes first; empty
        where it is anything else.
        """
        layout, count = self.layout, self.query.shape[1]
        if layout is None or layout.visual is None:
            return ()
        if not count < self.key.shape[1] == layout.length:
            return ()
        visual = layout.visual_slice
        following = slice(visual.start, layout.length)
        candidates = [(visual,), layout.own_slices, (following,)]
        if self.attached.state.binding.attends_text_apart:
            candidates.append((slice(layout.segments[0].length, layout.length),))
        for parts in candidates:
            if count == sum(part.stop - part.start for part in parts):
                return parts
        return ()

    @property
    def is_visual_part(self) -> bool:
        """Whether the queries are a part of the tokens, all visual ones among them."""
        return bool(self.asking)

    @property
    def is_text_part(self) -> bool:
        """Whether text (and images within it) attend to themselves, in models that do this apart.

        They may do it part by part, each with all keys so far.
        """
        layout = self.layout
        if not self.attached.state.binding.attends_text_apart or layout is None:
            return False
        return (
            layout.visual is not None and self.key.shape[1] <= layout.length - layout.visual.length
        )

    @property
    def is_cross_attention(self) -> bool:
        """Whether queries attend to another sequence, as in the image part of an IP-Adapter."""
        return self.query.shape[1] != self.key.shape[1] and not self.is_visual_part

    def completed(self, rows: Tensor) -> Tensor:
        """Returns rows as the queries are, (B, N, H, D), with zeros for tokens that do not ask."""
        asking = self.asking
        if not asking:
            return rows
        layout: Any = self.layout
        whole = rows.new_zeros(len(rows), layout.length, *rows.shape[2:])
        pieces = rows.split([part.stop - part.start for part in asking], 1)
        for part, piece in zip(asking, pieces, strict=True):
            whole[:, part] = piece
        return whole

    def asked(self, rows: Tensor) -> Tensor:
        """Returns those of the rows (B, N, ...) that the call asks for."""
        asking = self.asking
        if not asking:
            return rows
        first, *others = (rows[:, part] for part in asking)
        return torch.cat([first, *others], 1) if others else first

    @property
    def layout(self) -> TokenLayout | None:
        """The tokens of the sequence, None where the model call does not tell."""
        state = self.attached.state
        layout, tokens = state.layout(self.layer), self.key.shape[1]
        if layout is not None and state.binding.cuts_text and tokens < layout.length:
            return layout.cut(tokens)
        return layout

    def rows(self, part: slice) -> AttentionCall:
        """Returns the call for some samples of the batch."""
        mask = self.mask
        if mask is not None and mask.ndim > 1 and len(mask) == len(self.query):
            mask = mask[part]
        return replace(
            self, query=self.query[part], key=self.key[part], value=self.value[part], mask=mask
        )

    def dense(self) -> Tensor:
        """Answers the call as the stock layer would, with the backend that the user chose."""
        if self.dispatch is not None:
            return dispatch_attention_fn(
                self.query, self.key, self.value, attn_mask=self.mask, scale=self.scale,
                **self.options, **self.dispatch,
            )  # fmt: skip
        query, key, value = (x.transpose(1, 2) for x in (self.query, self.key, self.value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, scale=self.scale, **self.options
        )
        return output.transpose(1, 2)

    def inputs(self) -> AttentionInputs:
        """Returns the call as methods take it.

        Raises:
            ModelError: The call cannot go to a method; says why.
        """
        reason = obstacle(self)
        if reason:
            raise ModelError(f"attention of {self.layer.name} cannot be changed: {reason}")
        layout: Any = self.layout
        return self.attached.state.inputs(self, layout)

    def alone(self) -> AttentionCall:
        """Returns the call as one whose tokens are all here."""
        if self.dispatch is None:
            return self
        return replace(self, dispatch={**self.dispatch, "parallel_config": None})


Compute = Callable[[AttentionCall], Tensor]


class AttentionHook:
    """Something that acts at the attention of chosen layers, around whatever computes it.

    Attributes:
        is_active: Whether it acts at present. Switched freely; nothing is attached anew.
        wraps_processor: Whether `process` is called for whole layers, beside `attend` for each
            of their attention calls. Such a hook cannot act inside a compiled graph.
    """

    is_active: bool = False
    wraps_processor: bool = False

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Answers one attention call with (B, N, H, D); `compute` answers it without this hook."""
        return compute(call)

    def process(
        self, attached: AttachedLayer, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Runs a whole layer; `run(*args, **kwargs)` is its processor."""
        return run(*args, **kwargs)
