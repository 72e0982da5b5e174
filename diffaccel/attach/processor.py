"""Attached processors: a model's own attention processors with only the kernel replaced.

A stock processor projects, normalises and rotates query, key and value, then calls SDPA, either
itself or through diffusers' attention dispatcher. An attached processor is the same processor
(same class body, same attributes); while it runs, its SDPA call goes to the method.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from diffaccel.attach.state import Run
from diffaccel.bindings import AttentionLayer
from diffaccel.errors import ModelError
from diffaccel.layout import TokenLayout

LINK = "_diffaccel_link"


@dataclass(slots=True)
class Link:
    """What an attached processor knows: the processor it stands for, its layer, the run."""

    stock: Any
    layer: AttentionLayer
    run: Run

    def serve(self, processor: Any, stock_class: type, args: tuple, kwargs: dict) -> Any:
        """Runs one layer: the stock processor itself, or with the method as its kernel."""
        run, layer = self.run, self.layer
        reason = run.scheduled_dense(layer)
        if not reason:
            reason = _parallelism_obstacle(self.stock, layer)
            if reason:
                run.warn_once(layer, reason)
        if reason and not run.perturbs(layer):
            run.record(layer, 1.0, reason)
            return self.stock(*args, **kwargs)
        with KernelSwap(self, reason) as swap:
            output = stock_class.__call__(processor, *args, **kwargs)
        if not swap.called:
            reason = f"{stock_class.__name__} does not compute its attention with SDPA"
            if run.perturbs(layer):
                raise ModelError(f"heads of {layer.name} cannot be perturbed: {reason}")
            run.warn_once(layer, reason)
            run.record(layer, 1.0, reason)
        return output


def attached(stock: Any, layer: AttentionLayer, run: Run) -> Any:
    """Returns a processor that does what `stock` does, with the method as its kernel."""
    return linked(stock, Link(stock, layer, run))


def linked(stock: Any, link: Any) -> Any:
    """Returns a processor of the class of `stock` whose calls go to `link.serve`.

    Args:
        stock: A stock attention processor.
        link: Has the attributes `stock` and `layer`, and `serve(processor, stock_class, args,
            kwargs)`, which returns what the processor returns.
    """
    processor = _build(type(stock), stock.__dict__)
    setattr(processor, LINK, link)
    return processor


def stock_of(processor: Any) -> Any:
    """Returns the processor that an attached one stands for, or None for any other."""
    link = getattr(processor, LINK, None)
    return None if link is None else link.stock


@functools.cache
def attached_class(stock_class: type) -> type:
    """Returns the one subclass of a stock processor class that attached processors have.

    Its `__call__` has the stock signature: attention modules drop arguments outside of it.
    """

    @functools.wraps(stock_class.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, stock_class, args, kwargs)

    body = {
        "__call__": call,
        "__setattr__": _set_attribute,
        "__reduce__": _reduce,
        "__module__": __name__,
    }
    if hasattr(stock_class, "_attention_backend"):
        body["_attention_backend"] = property(_native_backend)
    if hasattr(stock_class, "_parallel_config"):
        body["_parallel_config"] = property(_stock_parallel_config)
    subclass = type(f"Attached{stock_class.__name__}", (stock_class,), body)
    _register_for_guiders(stock_class, subclass)
    return subclass


@torch.compiler.disable
def _call(processor: Any, stock_class: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs one attention layer as its link says."""
    return getattr(processor, LINK).serve(processor, stock_class, args, kwargs)


class KernelSwap(TorchFunctionMode):
    """While active, sends SDPA calls over a layer's whole sequence to the method.

    Args:
        link: The layer and its run.
        why_dense: Why the call runs dense all the same, "" where it does not.
    """

    def __init__(self, link: Link, why_dense: str = "") -> None:
        super().__init__()
        self.link = link
        self.why_dense = why_dense
        self.called = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.called = True
        call = AttentionCall(*args, **kwargs)
        if call.is_cross_attention():
            return func(*args, **kwargs)
        run, layer = self.link.run, self.link.layer
        layout = run.layout(layer)
        obstacle = self._obstacle(call, layout)
        if obstacle:
            if run.perturbs(layer):
                raise ModelError(f"heads of {layer.name} cannot be perturbed: {obstacle}")
            run.warn_once(layer, obstacle)
        reason = self.why_dense or obstacle
        if not reason:
            reason = run.forecast(layer, layout, call.query.transpose(1, 2)).why_dense
        if reason:
            run.record(layer, 1.0, reason)
            output = func(*args, **kwargs)
        else:
            output = self._attend(call, layout)
        return self._perturbed(call, layout, output) if run.perturbs(layer) else output

    def _obstacle(self, call: AttentionCall, layout: TokenLayout | None) -> str:
        """Returns why this call cannot go to the method, "" where it can."""
        run, layer = self.link.run, self.link.layer
        length = call.query.shape[2]
        if layout is None:
            return run.why_no_layout(layer)
        if layout.length != length:
            return (
                f"the layout read from the model call has {layout.length} tokens, "
                f"the layer got {length}"
            )
        if call.dropout_p or call.is_causal or call.query.shape[1] != call.key.shape[1]:
            return "dropout, causal masks and grouped heads are not supported"
        if call.attn_mask is not None and self._padding_mask(call) is None:
            return f"an attention mask of shape {tuple(call.attn_mask.shape)} is not key padding"
        if _attention_scores_are_skipped():
            return "a guider skips the attention scores of this call"
        return ""

    def _attend(self, call: AttentionCall, layout: TokenLayout) -> Tensor:
        run, layer = self.link.run, self.link.layer
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        output, density = run.method.attend_with_density(
            query,
            key,
            value,
            layout,
            scale=call.scale,
            key_padding_mask=self._padding_mask(call),
            layer=layer.index,
            step=run.clock.step,
            progress=run.clock.progress,
        )
        ran_dense = isinstance(density, float) and density == 1.0
        reason = run.method.dense_reason(layout) if ran_dense else ""
        run.record(layer, density, reason, run.forecast(layer, layout, query).work)
        return output.transpose(1, 2)

    def _perturbed(self, call: AttentionCall, layout: TokenLayout, output: Tensor) -> Tensor:
        tokens = (x.transpose(1, 2) for x in (call.query, call.key, call.value, output))
        perturbed = self.link.run.perturbation.perturb(
            *tokens,
            layout,
            scale=call.scale,
            key_padding_mask=self._padding_mask(call),
            layer=self.link.layer.index,
        )
        return perturbed.transpose(1, 2)

    def _padding_mask(self, call: AttentionCall) -> Tensor | None:
        if call.attn_mask is None:
            return None
        batch, _, length, _ = call.query.shape
        return self.link.run.padding_mask(call.attn_mask, batch, length)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of one SDPA call; tensors (B, H, N, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def is_cross_attention(self) -> bool:
        """Whether queries attend to another sequence, as in the image part of an IP-Adapter."""
        return self.query.shape[2] != self.key.shape[2]


def _build(stock_class: type, attributes: dict[str, Any]) -> Any:
    processor = attached_class(stock_class).__new__(attached_class(stock_class))
    processor.__dict__.update(attributes)
    return processor


def _reduce(processor: Any) -> tuple:
    # Generated classes cannot be found by name: copies and pickles name the stock class instead.
    return _build, (type(stock_of(processor)), dict(processor.__dict__))


def _set_attribute(processor: Any, name: str, value: Any) -> None:
    """Sets an attribute (IP-Adapter scale, backend) on the stock processor as well."""
    stock = stock_of(processor)
    if stock is not None:
        setattr(stock, name, value)
    if not isinstance(getattr(type(processor), name, None), property):
        super(type(processor), processor).__setattr__(name, value)


def _native_backend(processor: Any) -> AttentionBackendName:
    # The dispatcher must end in SDPA. The backend that the user chose serves the dense calls.
    return AttentionBackendName.NATIVE


def _stock_parallel_config(processor: Any) -> Any:
    return stock_of(processor)._parallel_config


def _register_for_guiders(stock_class: type, subclass: type) -> None:
    """Tells diffusers' guiders, which look processors up by exact class, about a subclass."""
    try:
        metadata = AttentionProcessorRegistry.get(stock_class)
    except ValueError:
        return
    AttentionProcessorRegistry.register(subclass, metadata)


def _attention_scores_are_skipped() -> bool:
    """Whether a guider (perturbed attention) replaces SDPA around this call."""
    stack = _get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in stack)


def _parallelism_obstacle(stock: Any, layer: AttentionLayer) -> str:
    """Returns why context parallelism keeps the method from a layer, "" where it does not.

    Ulysses hands a layer all tokens and a part of the heads, which suits every method.
    """
    config = getattr(stock, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return ""
    if layer.kind == "joint":
        return "context parallelism changes the token order of joint sequences"
    if (context.ring_degree or 1) > 1:
        return "ring parallelism shows a layer only a part of the keys at a time"
    return ""
