"""What every attention method is: a frozen configuration with one public entry, `attend`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.published import published

if TYPE_CHECKING:
    from typing import Self

DenseLayers = tuple[int, ...] | int | None


class Work(NamedTuple):
    """How much a kernel computes, as shares of all N x N query-key pairs.

    Args:
        visited: What it computes, pairs that it masks included.
        ideal: What it would compute if its tiles fitted the windows perfectly.
    """

    visited: float
    ideal: float


@dataclass(frozen=True, slots=True)
class Method:
    """Maps query, key, value and their token layout to an attention output.

    A subclass is a frozen, slotted dataclass whose fields are its whole configuration, and
    implements `_attend`. It may have the fields `dense_steps` and `dense_layers` (its schedule)
    and `first_frame`; where these are None, `resolved` fills them with what was published for
    a model family.
    """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        layer: int | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Computes self-attention over one sequence.

        Args:
            query: (B, N, H, D), any float dtype, position embedding already applied.
            key: (B, N, H, D).
            value: (B, N, H, D).
            layout: What the N tokens are; `layout.length` must be N.
            scale: Factor on the logits, D ** -0.5 by default.
            key_padding_mask: (B, N) bool, True where a token may be attended. Output rows of
                padded queries are meaningless.
            layer: Index among the attached layers, for `dense_layers`; None means unscheduled.
            step: Index of the denoising step, for `dense_steps`; None means unscheduled.
            progress: Share of the schedule that lies behind, 0 to 1, for the methods that follow
                it; None means unscheduled.

        Returns:
            (B, N, H, D) in the dtype of query.
        """
        return self.attend_with_density(
            query,
            key,
            value,
            layout,
            scale=scale,
            key_padding_mask=key_padding_mask,
            layer=layer,
            step=step,
            progress=progress,
        )[0]

    def attend_with_density(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        layer: int | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        """Like `attend`, and says which part of the work was done.

        Returns:
            The output (B, N, H, D), and the share of the N x N query-key pairs that were
            computed exactly: 1.0 where the call ran dense, else a 0-dim fp32 tensor on the
            device of query (reading it is the caller's synchronisation).
        """
        check_inputs(query, key, value, layout, scale, key_padding_mask)
        if key_padding_mask is not None and key_padding_mask.device.type == "cpu":
            # Free to ask on a CPU only: elsewhere it would wait for the device.
            key_padding_mask = None if key_padding_mask.all() else key_padding_mask
        tokens, options = (
            (query, key, value),
            {"scale": scale, "key_padding_mask": key_padding_mask},
        )
        if self.runs_dense(layer, step, progress):
            return dense_attention(*tokens, **options), 1.0
        return self._attend(*tokens, layout, **options, layer=layer)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuses to be an attention processor, which `model.set_attn_processor` makes of it."""
        raise TypeError(
            f"{type(self).__name__} is a method, not an attention processor: instead of "
            "model.set_attn_processor(method) write diffaccel.set_attn_processor(model, method) "
            "or pipe.set_attn_processor(method), on a freshly loaded model"
        )

    def runs_dense(
        self,
        layer: int | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> bool:
        """Whether the schedule (`dense_steps`, `dense_layers`) makes this call dense."""
        dense_steps = getattr(self, "dense_steps", None) or 0
        if step is not None and step < dense_steps:
            return True
        dense_layers = getattr(self, "dense_layers", None) or 0
        if layer is None:
            return False
        return layer < dense_layers if isinstance(dense_layers, int) else layer in dense_layers

    def dense_reason(self, layout: TokenLayout) -> str:
        """Says why a call that the schedule leaves to the method runs dense all the same."""
        return "the method computes this shape densely"

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Predicts the share of the query-key pairs that is computed exactly.

        None where only a run tells. The schedule is not looked at; a floor on the attention mass
        may keep more.
        """
        return None

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Predicts the time of the attention kernel in terms of dense attention.

        Args:
            layout: The tokens.
            device: Type of the device, "cpu" or "cuda".

        Returns:
            Share of the dense time, without what selecting costs; None where the method runs
            dense itself.
        """
        return None

    def work(self, layout: TokenLayout, query: Tensor, layer: int | None = None) -> Work | None:
        """Says what the kernel computes for a query (B, N, H, D) on its device.

        None where that is what the density says, or where the method runs dense.
        """
        return None

    def resolved(self, family: str, num_layers: int, expert: int = 0) -> Self:
        """Fills schedule knobs that are None with the values published for a model family.

        Args:
            family: A name from `diffaccel.methods.published.PUBLISHED`. A family without
                published values resolves to 0 dense steps, no dense layers.
            num_layers: Number of layers that the method is attached to in this model.
            expert: Which denoiser of a pipeline with several (Wan 2.2 A14B: 0 = high noise,
                1 = low noise). Steps then count from the first step of that expert.

        Returns:
            A method of the same class whose schedule knobs are all set.
        """
        values = published(family)
        known = {
            "dense_steps": values.dense_steps_of(expert),
            "dense_layers": values.dense_layers_of(num_layers),
            "first_frame": values.first_frame,
        }
        unset = {
            field.name: known[field.name]
            for field in fields(self)
            if field.name in known and getattr(self, field.name) is None
        }
        return replace(self, **unset)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        layer: int | None,
    ) -> tuple[Tensor, Tensor | float]:
        raise NotImplementedError(f"{type(self).__name__} does not implement _attend")


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    scale: float | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Raises ValueError or TypeError unless the arguments of `attend` fit together."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"layout must be a TokenLayout, got {type(layout).__name__}; "
            "use TokenLayout.image(height, width) or TokenLayout.video(frames, height, width)"
        )
    shape = tuple(query.shape)
    if len(shape) != 4 or tuple(key.shape) != shape or tuple(value.shape) != shape:
        raise ValueError(
            "query, key and value must have one shape (B, N, H, D), got "
            f"{shape}, {tuple(key.shape)} and {tuple(value.shape)}; "
            "transpose (B, H, N, D) tensors with .transpose(1, 2)"
        )
    if not query.is_floating_point() or key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(
            "query, key and value must have one floating-point dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if layout.length != shape[1]:
        raise ValueError(
            f"the layout must describe all N tokens, got a layout of {layout.length} tokens for "
            f"N={shape[1]}; add the missing segments (text, condition) or correct the grid"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale=}; None means D ** -0.5")
    if key_padding_mask is None:
        return
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool (True = may be attended), got "
            f"{key_padding_mask.dtype}; convert with .bool()"
        )
    if tuple(key_padding_mask.shape) != shape[:2]:
        raise ValueError(
            f"key_padding_mask must be (B, N) = {shape[:2]}, "
            f"got {tuple(key_padding_mask.shape)}; it covers the whole sequence"
        )


def check_schedule(dense_steps: int | None, dense_layers: DenseLayers) -> None:
    """Raises ValueError unless the schedule knobs of a method are in range."""
    if dense_steps is not None and (not isinstance(dense_steps, int) or dense_steps < 0):
        raise ValueError(
            f"dense_steps must be None or an integer of at least 0, got {dense_steps=}; "
            "None takes the value published for the model family"
        )
    layers = dense_layers if isinstance(dense_layers, tuple) else (dense_layers or 0,)
    if not all(isinstance(layer, int) and layer >= 0 for layer in layers):
        raise ValueError(
            "dense_layers must be None, a number of first layers or a tuple of layer indices "
            f"of at least 0, got {dense_layers=}"
        )
