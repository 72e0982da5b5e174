"""State of one attached denoiser: its current model call, and what acts at its attention."""

from __future__ import annotations

import warnings
from dataclasses import replace
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.attach.processor import attached_layer
from diffaccel.attach.running import running_pipeline
from diffaccel.bindings import LayoutUnknown, ModelCall
from diffaccel.errors import ModelError
from diffaccel.layout import TokenLayout
from diffaccel.methods.inputs import Attended, AttentionInputs, Position

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from diffaccel.attach.call import AttentionCall, AttentionHook
    from diffaccel.attach.method_state import MethodState
    from diffaccel.attach.seam import AttachedLayer
    from diffaccel.bindings import AttentionLayer, Binding


class DenoiserState:
    """What acts at the attention of one denoiser, and what its current model call tells.

    `begin_call` is the denoiser's forward pre-hook. Holds no module, so that a deep copy of the
    model gets a complete state of its own.

    Args:
        binding: How the model's attention reaches methods.
        layers: Its layers of self-attention over visual tokens.

    Attributes:
        method: What computes the self-attention, None where the stock processors do.
        hooks: Path of a layer -> what else acts at its attention, outermost last.
        root_hooks: Handles of the denoiser's hooks.
    """

    def __init__(self, binding: Binding, layers: tuple[AttentionLayer, ...]) -> None:
        self.binding = binding
        self.layers = layers
        self.method: MethodState | None = None
        self.hooks: dict[str, tuple[AttentionHook, ...]] = {}
        self.root_hooks: tuple[RemovableHandle, ...] = ()
        self._readings: dict[int, tuple[Tensor, Any]] = {}
        # Thread and depth of the call that runs; setdefault and pop are atomic, and are copied.
        self._caller: dict[str, int] = {}
        self._depth = 0
        self._forget_call()

    @torch.compiler.disable
    def begin_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads step and layouts of one model call; runs before the model does.

        Raises:
            ModelError: The model runs in another thread.
        """
        self._caller.setdefault("thread", get_ident())
        self.check_thread(model)
        self._depth += 1
        self._forget_call()
        call = ModelCall.of(model, args, kwargs, self._readings)
        if self.method is not None:
            pipe = running_pipeline(model)
            if self.method.begin_call(call.arguments.get(self.binding.timestep), pipe):
                self._warn_of_lost(model)
        streams: dict[tuple[str, int], TokenLayout | str] = {}
        for layer in self.layers:
            if layer.stream not in streams:
                streams[layer.stream] = self._read_layout(model, call, layer)
            self._layouts[layer.name] = streams[layer.stream]

    @torch.compiler.disable
    def end_call(self, *_: Any) -> None:
        """Lets other threads call the model; runs after it, also where it failed."""
        if self._caller.get("thread") == get_ident():
            self._depth -= 1
            if self._depth == 0:
                self._caller.pop("thread")

    def check_thread(self, model: nn.Module) -> None:
        """Refuses while the model runs in another thread: steps and layouts are of one call.

        Raises:
            ModelError: It does.
        """
        if self._caller.get("thread", get_ident()) != get_ident():
            raise ModelError(
                f"an attached model runs in one thread at a time, and {type(model).__name__} runs "
                "in another one; wait for it, or give each thread a copy of the model"
            )

    def attend(self, call: AttentionCall) -> Tensor:
        """Answers an attention call (B, N, H, D) by the method, or as the stock layer would."""
        layer = call.attached.layer
        if self.method is None or layer.kind == "cross" or call.is_text_part:
            return call.dense()
        if call.is_cross_attention:
            if call.index == 0:
                reason = "its keys come from another sequence"
                self.method.record(layer, self.layout(layer), reason)
            return call.dense()
        return self.method.attend(call)

    def layout(self, layer: AttentionLayer) -> TokenLayout | None:
        """Returns the tokens of a layer in the current model call, None where unknown."""
        found = self._layouts.get(layer.name)
        return found if isinstance(found, TokenLayout) else None

    def why_no_layout(self, layer: AttentionLayer) -> str:
        """Returns why the current model call does not tell the tokens of a layer."""
        found = self._layouts.get(layer.name)
        return found if isinstance(found, str) else "the layer ran outside its model's forward"

    def inputs(self, call: AttentionCall, layout: TokenLayout) -> AttentionInputs:
        """Returns a call that has no obstacle as methods take it."""
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        mask = None if call.mask is None else self.padding_mask(call)
        key, value = call.key, call.value
        groups = call.query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
        return AttentionInputs(call.completed(call.query), key, value, layout, scale, mask)

    def compute(self, call: AttentionCall, layout: TokenLayout, position: Position) -> Attended:
        """Answers a call that has no obstacle by the method."""
        method: Any = self.method
        attended = method.method.compute(self.inputs(call, layout), position)
        output = call.asked(attended.output)
        mask = call.mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] == layout.length > 1:
            # Methods know the mask of the visual rows; text may have another one, as a causal one.
            for rows in () if call.is_visual_part else layout.exact_slices:
                output[:, rows] = replace(
                    call, query=call.query[:, rows], mask=mask[..., rows, :]
                ).dense()
        return attended._replace(output=output)

    def padding_mask(self, call: AttentionCall) -> Tensor | None:
        """Returns the mask of a call as a (B, N) bool key-padding mask, True = may be attended.

        None where there is none, or where it is anything else for the visual rows. Converted once
        per mask and model call: all layers get the same one.
        """
        mask = call.mask
        if mask is None:
            return None
        known = self._masks.get(id(mask))
        if known is None:
            batch, length = call.key.shape[:2]
            layout = None if call.is_visual_part else call.layout
            rows = slice(None) if layout is None else layout.visual_slice
            # Keeping the mask keeps its id from being given to another one.
            known = self._masks[id(mask)] = (mask, as_padding_mask(mask, batch, length, rows))
        return known[1]

    def never_called(self, attached: AttachedLayer) -> None:
        """Notes that a layer's processor computed its attention in another way."""
        layer = attached.layer
        reason = f"{type(attached.stock).__name__} does not compute its attention with SDPA"
        if any(hook.is_active for hook in self.hooks.get(layer.name, ())):
            raise ModelError(f"attention of {layer.name} cannot be changed: {reason}")
        if self.method is not None and layer.kind != "cross":
            self.warn_once(layer, reason)
            self.method.record(layer, self.layout(layer), reason)

    def warn_once(self, layer: AttentionLayer, reason: str) -> None:
        """Warns that a layer ran dense unexpectedly, once for each reason."""
        if self.method is not None and reason not in self.method.warned:
            self.method.warned.add(reason)
            name = type(self.method.method).__name__
            warnings.warn(f"{name} ran dense in {layer.name}: {reason}", stacklevel=2)

    def lost(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the layers of the method whose processors were replaced since."""
        return tuple(
            layer.name
            for layer in (() if self.method is None else self.method.layers)
            if attached_layer(model.get_submodule(layer.name).processor) is None
        )

    def _warn_of_lost(self, model: nn.Module) -> None:
        lost = self.lost(model)
        if lost and self.method is not None and "lost" not in self.method.warned:
            self.method.warned.add("lost")
            name = type(self.method.method).__name__
            warnings.warn(
                f"{name} no longer serves {len(lost)} layers, {lost[0]} first: their processors "
                "were replaced after it was attached; call set_attn_processor again",
                stacklevel=1,
            )

    def add_hook(self, hook: AttentionHook, names: tuple[str, ...]) -> None:
        """Lets a hook act at some layers, around the hooks that they have."""
        for name in names:
            self.hooks[name] = (*self.hooks.get(name, ()), hook)

    def remove_hook(self, hook: AttentionHook) -> None:
        """Takes a hook off all layers; does nothing where it is on none."""
        kept = {
            name: tuple(other for other in hooks if other is not hook)
            for name, hooks in self.hooks.items()
        }
        self.hooks = {name: hooks for name, hooks in kept.items() if hooks}

    def _read_layout(
        self, model: nn.Module, call: ModelCall, layer: AttentionLayer
    ) -> TokenLayout | str:
        try:
            layout = self.binding.layout(model, call, layer)
            return replace(layout, native=self.binding.native(model, layer))
        except LayoutUnknown as unknown:
            return str(unknown)

    def _forget_call(self) -> None:
        self._layouts: dict[str, TokenLayout | str] = {}
        self._masks: dict[int, tuple[Tensor, Tensor | None]] = {}


def state_of(model: nn.Module) -> DenoiserState | None:
    """Returns the state of an attached denoiser, found at its forward pre-hook."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, DenoiserState):
            return owner
    return None


def as_padding_mask(
    mask: Tensor, batch: int, length: int, rows: slice = slice(None)
) -> Tensor | None:
    """Returns an attention mask as (B, N) key padding, None where it is anything else.

    Key padding that is written out for every query or head is recognised, which waits for the
    device.

    Args:
        mask: As for SDPA: bool, or floats added to the logits.
        batch: B.
        length: N.
        rows: The queries that count, where the mask has a row for each.
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[3] != length or mask.shape[0] not in (1, batch):
        return None
    if mask.shape[2] > 1:
        mask = mask[:, :, rows]
    for axis in (1, 2):
        first = mask[:, :1] if axis == 1 else mask[:, :, :1]
        if mask.shape[axis] > 1 and not (mask == first).all():
            return None
        mask = first
    mask = mask.reshape(-1, length).expand(batch, length)
    if mask.dtype == torch.bool:
        return mask
    # Additive: padding is written as 0 and some large negative number; anything else is a bias.
    is_open = mask == 0
    is_padding_only = (is_open | (mask <= -1e4)).all()
    return is_open if is_padding_only else None
