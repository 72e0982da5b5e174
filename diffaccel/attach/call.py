"""One attention call of an attached layer, and what may act around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)
from torch import Tensor

from diffaccel.attach.obstacles import obstacle
from diffaccel.errors import ModelError
from diffaccel.methods.inputs import AttentionInputs

if TYPE_CHECKING:
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

    @property
    def layer(self) -> AttentionLayer:
        """The layer that makes the call."""
        return self.attached.layer

    @property
    def part(self) -> slice | None:
        """Which tokens ask, where the keys are those of all tokens and the queries are not.

        Those are the visual tokens alone or, where text attends to itself apart, all but the text.
        """
        layout, asking = self.layout, self.query.shape[1]
        if layout is None or layout.visual is None or self.key.shape[1] != layout.length:
            return None
        if asking == layout.visual.length != layout.length:
            return layout.visual_slice
        text = layout.segments[0].length if self._attends_text_apart else 0
        return slice(text, layout.length) if text and asking == layout.length - text else None

    @property
    def is_visual_part(self) -> bool:
        """Whether the queries are visual tokens, perhaps with conditions, and the keys all."""
        return self.part is not None

    @property
    def is_text_part(self) -> bool:
        """Whether the text attends to itself, in models that do this in a call of its own."""
        layout, asking = self.layout, self.query.shape[1]
        if not self._attends_text_apart or layout is None or layout.visual is None:
            return False
        texts = (layout.length - layout.visual.length, layout.text_length)
        return asking == self.key.shape[1] and asking in texts

    @property
    def _attends_text_apart(self) -> bool:
        return self.attached.state.binding.attends_text_apart

    @property
    def is_cross_attention(self) -> bool:
        """Whether queries attend to another sequence, as in the image part of an IP-Adapter."""
        return self.query.shape[1] != self.key.shape[1] and not self.is_visual_part

    def completed(self, rows: Tensor) -> Tensor:
        """Returns rows as the queries are, (B, N, H, D), with zeros for tokens that do not ask."""
        part = self.part
        if part is None:
            return rows
        whole = rows.new_zeros(len(rows), self.key.shape[1], *rows.shape[2:])
        whole[:, part] = rows
        return whole

    def asked(self, rows: Tensor) -> Tensor:
        """Returns those of the rows (B, N, ...) that the call asks for."""
        part = self.part
        return rows if part is None else rows[:, part]

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

    @property
    def context_parallelism(self) -> Any:
        """diffusers' configuration of context parallelism, None without."""
        config = None if self.dispatch is None else self.dispatch.get("parallel_config")
        return getattr(config, "context_parallel_config", None)

    def gathered(self, compute: Compute) -> Tensor:
        """Answers a call under Ulysses parallelism: all tokens and a part of the heads."""
        options: Any = self.dispatch

        def forward(
            context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *_: Any,
            **__: Any,
        ) -> Tensor:  # fmt: skip
            dispatch = {**options, "parallel_config": None}
            return compute(
                replace(self, query=query, key=key, value=value, mask=mask, dispatch=dispatch)
            )

        return _templated_context_parallel_attention(
            self.query, self.key, self.value, self.mask, scale=self.scale, forward_op=forward,
            backward_op=None, _parallel_config=options["parallel_config"],
        )  # fmt: skip


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
