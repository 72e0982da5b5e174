"""State of one attached denoiser: its current model call, and what acts at its attention."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.attach.key_bias import folded, split_mask
from diffaccel.attach.processor import attached_layer, redirected, why_opaque
from diffaccel.attach.running import Caller, running_pipeline
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
    from diffaccel.methods.base import Method


REPLACED = "its processor was replaced after the method was attached"
GUIDES = "the pipeline guides at this layer, with a processor of its own"


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
        context: diffusers' configuration of context parallelism, None without.
    """

    def __init__(self, binding: Binding, layers: tuple[AttentionLayer, ...]) -> None:
        self.binding = binding
        self.layers = layers
        self.method: MethodState | None = None
        self.hooks: dict[str, tuple[AttentionHook, ...]] = {}
        self.root_hooks: tuple[RemovableHandle, ...] = ()
        self.context: Any = None
        self._readings: dict[int, tuple[Tensor, Any]] = {}
        self._written: Tensor | None = None
        self._lost: dict[str, str] = {}
        self._caller = Caller()
        self._forget_call()

    @torch.compiler.disable
    def begin_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads step and layouts of one model call; runs before the model does.

        Raises:
            ModelError: The model, or a pipeline that has begun with it, runs in another thread, or
                on ranks that its method cannot share.
        """
        self._caller.enter(model)
        self._forget_call()
        self.context = context_of(model)
        if self.context is not None and self.method is not None:
            self.method.check_parallel(self.context)
        call = ModelCall.of(model, args, kwargs, self._readings)
        if self.method is not None:
            pipe = running_pipeline(model)
            if self.method.begin_call(self.binding.timestep(call), pipe):
                self._lost = self.lost(model)
                self._warn_of_lost()
        self._written = self.binding.written_mask(call)
        streams: dict[tuple[str, int], TokenLayout | str] = {}
        for layer in self.layers:
            if layer.stream not in streams:
                streams[layer.stream] = self._read_layout(model, call, layer)
            self._layouts[layer.name] = streams[layer.stream]
        if self.method is not None and self._lost:
            for name, reason in self.lost(model).items():
                layer = next(layer for layer in self.method.layers if layer.name == name)
                self.method.record(layer, self.layout(layer), reason)

    @torch.compiler.disable
    def end_call(self, *_: Any) -> None:
        """Lets other threads call the model; runs after it, also where it failed."""
        self._caller.leave()

    def attend(self, call: AttentionCall) -> Tensor:
        """Answers an attention call (B, N, H, D) by the method, or as the stock layer would."""
        layer = call.attached.layer
        if self.method is None or layer.kind == "cross" or call.is_text_part:
            return call.dense()
        if call.is_cross_attention:
            # Beside the calls of text, one that does not fit the layout is no cross-attention.
            is_unfit = self.binding.attends_text_apart and call.layout is not None
            if call.index == 0 or is_unfit:
                reason = "its keys come from another sequence"
                self.method.record(layer, self.layout(layer), reason)
            return call.dense()
        return self.method.attend(call)

    def exchange_method(self, method: MethodState | None) -> None:
        """Lets another method compute the self-attention, None for the stock processors."""
        if self.method is not None:
            self.method.forget()
        self.method = method

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
        query, asking = call.completed(call.query), call.asking
        bias = self.key_bias(call)
        if bias is not None:
            query, key, value = folded(query, key, value, bias, scale)
        exact = tuple(part for part in asking if part != layout.visual_slice) if asking else None
        first = None if call.share is None else call.share.first_head
        return AttentionInputs(query, key, value, layout, scale, mask, exact, first)

    def compute(
        self, call: AttentionCall, layout: TokenLayout, method: Method, position: Position
    ) -> Attended:
        """Answers a call that has no obstacle by a method."""
        attended = method.compute(self.inputs(call, layout), position)
        output = call.asked(attended.output)[..., : call.value.shape[-1]]
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
        if not isinstance(mask, Tensor):  # FlexAttention has masks of its own
            return None
        split = self._split(call)
        if split is not None:
            return split[0]
        batch, length = call.key.shape[:2]
        known = self._masks.get((id(mask), length))
        if known is None:
            layout = None if call.is_visual_part else call.layout
            rows = slice(None) if layout is None else layout.visual_slice
            written = mask
            if call.dispatch is not None and mask.shape == (batch, length):
                written = mask[:, None, None]  # diffusers' dispatcher takes it as key padding
            # Keeping the mask keeps its id from being given to another one.
            known = mask, as_padding_mask(written, batch, length, rows)
            self._masks[id(mask), length] = known
        return known[1]

    def key_bias(self, call: AttentionCall) -> Tensor | None:
        """Returns what is added to the scores of keys in visual rows, (B, N), None for nothing."""
        split = None if call.mask is None else self._split(call)
        return None if split is None else split[1]

    def _split(self, call: AttentionCall) -> tuple[Tensor, Tensor | None] | None:
        """Returns padding and bias of a mask that blocks have written out for all pairs."""
        layout, written, mask = call.layout, self._written, call.mask
        if written is None or mask is None or layout is None or call.share is not None:
            return None
        if not written.shape[-1] == layout.length == mask.shape[-2]:
            return None
        return ModelCall({}, self._readings).read(written, lambda told: split_mask(told, layout))

    def never_called(self, attached: AttachedLayer) -> None:
        """Notes that a layer's processor computed its attention in another way, or left it out."""
        layer = attached.layer
        if redirected(type(attached.stock).__call__) is not None:
            if self.method is not None and layer.kind != "cross":
                self.method.leave_out(layer, self.layout(layer))
            return
        reason = why_opaque(attached.stock)
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

    def lost(self, model: nn.Module) -> dict[str, str]:
        """Returns the layers of the method whose processors were replaced since, and why."""
        lost = {}
        for layer in () if self.method is None else self.method.layers:
            processor: Any = model.get_submodule(layer.name).processor
            if attached_layer(processor) is None:
                is_guiding = type(processor).__name__.startswith("PAG")
                lost[layer.name] = GUIDES if is_guiding else REPLACED
        return lost

    def _warn_of_lost(self) -> None:
        lost = [name for name, reason in self._lost.items() if reason == REPLACED]
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
        self._written = None
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}


def state_of(model: nn.Module) -> DenoiserState | None:
    """Returns the state of an attached denoiser, found at its forward pre-hook."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, DenoiserState):
            return owner
    return None


def context_of(model: nn.Module) -> Any:
    """Returns diffusers' configuration of context parallelism of a denoiser, None without."""
    config = getattr(model, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def as_padding_mask(
    mask: Tensor, batch: int, length: int, rows: slice = slice(None)
) -> Tensor | None:
    """Returns an attention mask as (B, N) key padding, None where it is anything else.

    Key padding that is written out for every query or head is recognised, which waits for the
    device unless it is expanded.

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
        is_expanded = mask.shape[axis] == 1 or mask.stride(axis) == 0
        if not is_expanded and not (mask == first).all():
            return None
        mask = first
    mask = mask.reshape(-1, length).expand(batch, length)
    if mask.dtype == torch.bool:
        return mask
    # Additive: padding is written as 0 and some large negative number; anything else is a bias.
    is_open = mask == 0
    is_padding_only = (is_open | (mask <= -1e4)).all()
    return is_open if is_padding_only else None
