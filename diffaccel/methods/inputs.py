"""What one call of a method gets and gives: tensors with their layout, a position, a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.memory import LayerMemory


@dataclass(frozen=True, slots=True)
class Position:
    """Where in a model and in a run a call stands; None where nobody said.

    Args:
        layer: Index among the attached layers.
        step: Index of the denoising step.
        progress: Share of the schedule that lies behind, 0 to 1.
        ends: Share of the steps of the schedule that lies behind when this one is done.
        memory: What the method remembers of the layer from the run so far; None where calls
            know nothing of each other.
    """

    layer: int | None = None
    step: int | None = None
    progress: float | None = None
    ends: float | None = None
    memory: LayerMemory | None = field(default=None, compare=False, repr=False)

    def is_within(self, share: float) -> bool:
        """Whether a step belongs to the first part of the schedule.

        It does if it ends within that share, or begins within it where nobody knows its end.
        """
        if self.ends is not None:
            return self.ends <= share + 1e-9
        return self.progress is not None and self.progress < share


class Attended(NamedTuple):
    """What a method makes of a call.

    Args:
        output: (B, N, H, D) in the dtype of query.
        density: Share of the N x N pairs that were computed exactly, a number or a 0-dim fp32
            tensor on the device.
        why_dense: Why the call ran dense, "" where it did not.
        error: Relative error of the output as measured on sampled rows, 0-dim fp32 on the device;
            None where nobody measured.
    """

    output: Tensor
    density: Tensor | float
    why_dense: str = ""
    error: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class VisualTokens:
    """The visual tokens of a call, N of them.

    Args:
        query: (B, N, H, D).
        key: (B, N, H, D).
        value: (B, N, H, D).
        valid: (B, N) bool, True for real tokens; None for all.
        layout: The tokens of the whole sequence.
        scale: Factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    layout: TokenLayout
    scale: float


class ExactTokens(NamedTuple):
    """Text and condition tokens, T of them, which every query sees exactly.

    Args:
        key: (B, T, H, D), T may be 0.
        value: (B, T, H, D).
        valid: (B, T) bool, True for real tokens; None for all.
    """

    key: Tensor
    value: Tensor
    valid: Tensor | None

    def extras(self) -> dict[str, Any]:
        """Returns them as kernels take extra keys; none where T is 0."""
        if not self.key.shape[1]:
            return {}
        return {
            "extra_key": self.key, "extra_value": self.value, "extra_padding_mask": self.valid
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """One self-attention call, checked.

    Args:
        query: (B, N, H, D), any float dtype, position embedding already applied.
        key: (B, N, H, D).
        value: (B, N, H, D).
        layout: What the N tokens are.
        scale: Factor on the scores.
        mask: (B, N) bool, True where a token may be attended; None for all.
        asking: Where the text and condition tokens lie whose rows are wanted; None for all.
        first_head: Index in its layer of the first head where ranks share them, else None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    scale: float
    mask: Tensor | None
    asking: tuple[slice, ...] | None = None
    first_head: int | None = None

    @classmethod
    def checked(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> AttentionInputs:
        """Builds a call from the arguments of `Method.attend`.

        Raises:
            ValueError: If shapes, layout or scale do not fit together.
            TypeError: If a dtype does not fit.
        """
        query, key, value = as_autocast(query, key, value)
        _check_tokens(query, key, value, layout)
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be positive, got {scale=}; None means D ** -0.5")
        _check_mask(mask, query)
        if mask is not None and mask.device.type == "cpu":
            # Free to ask on a CPU only: elsewhere it would wait for the device.
            mask = None if mask.all() else mask
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(query, key, value, layout, scale, mask)

    def dense(self) -> Tensor:
        """Attends densely; (B, N, H, D)."""
        return self.dense_rows(slice(None))

    def dense_rows(self, rows: slice | Tensor) -> Tensor:
        """Attends densely with some of the queries."""
        return dense_attention(
            self.query[:, rows], self.key, self.value, scale=self.scale, key_padding_mask=self.mask
        )

    def visual(self) -> VisualTokens:
        """Returns the visual tokens, as views."""
        part = self.layout.visual_slice
        return VisualTokens(
            self.query[:, part],
            self.key[:, part],
            self.value[:, part],
            None if self.mask is None else self.mask[:, part],
            self.layout,
            self.scale,
        )

    def exact(self) -> ExactTokens:
        """Returns the text and condition tokens."""
        parts = self.layout.exact_slices
        valid = None if self.mask is None else _collected(self.mask, parts)
        return ExactTokens(_collected(self.key, parts), _collected(self.value, parts), valid)


def is_autocast(device: str) -> bool:
    """Whether `torch.autocast` is on for a type of device; some have none."""
    # PyTorch 2.8 cannot trace the first question; what is compiled for has autocast.
    is_known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return is_known and torch.is_autocast_enabled(device)


def as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Casts tensors as SDPA's arguments are under `torch.autocast`; else returns them as they are.

    fp64 stays, as do tensors that are no floats, and what is no tensor.
    """
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


GRADIENTS_NEEDED = "gradients are needed, and methods are for inference"


def need_gradients(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a backward pass may follow."""
    if not torch.is_grad_enabled():
        return False
    return query.requires_grad or key.requires_grad or value.requires_grad


def _collected(tokens: Tensor, parts: tuple[slice, ...]) -> Tensor:
    if len(parts) == 1:
        return tokens[:, parts[0]]
    return torch.cat([tokens[:, part] for part in parts], 1) if parts else tokens[:, :0]


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
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


def _check_mask(mask: Tensor | None, query: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool (True = may be attended), got "
            f"{mask.dtype}; convert with .bool()"
        )
    if tuple(mask.shape) != tuple(query.shape[:2]):
        raise ValueError(
            f"key_padding_mask must be (B, N) = {tuple(query.shape[:2])}, "
            f"got {tuple(mask.shape)}; it covers the whole sequence"
        )
