"""Attached processors: a model's own attention processors, whose attention goes to the seam.

A stock processor projects, normalises and rotates query, key and value, then calls SDPA, either
itself or through diffusers' attention dispatcher. An attached processor is the same processor
(same code, same attributes) with that call exchanged.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from torch._guards import TracingContext

from diffaccel.attach import seam
from diffaccel.attach.seam import AttachedLayer

ATTACHED = "_diffaccel_layer"
"""Attribute of an attached processor: its `AttachedLayer`. None makes it act as stock, as the
instances do that diffusers makes of a processor's class."""


def attached(layer: AttachedLayer) -> Any:
    """Returns a processor that does what the layer's stock processor does, at the seam."""
    stock = layer.stock
    processor = _build(type(stock), stock.__dict__)
    processor.__dict__[ATTACHED] = layer
    return processor


def attached_layer(processor: Any) -> AttachedLayer | None:
    """Returns what an attached processor knows, None for any other."""
    return getattr(processor, ATTACHED, None)


def stock_of(processor: Any) -> Any:
    """Returns the processor that an attached one stands for, None for any other."""
    layer = attached_layer(processor)
    return None if layer is None else layer.stock


def unattached(processor: Any) -> Any:
    """Returns a processor of a stock class: diffusers copies attached ones by their class."""
    stock_class = getattr(type(processor), "_diffaccel_stock_class", None)
    if stock_class is None:
        return processor
    stock = stock_class.__new__(stock_class)
    stock.__dict__.update(processor.__dict__)
    return stock


@functools.cache
def attached_class(stock_class: Any) -> type:
    """Returns the one subclass of a stock processor class that attached processors have.

    Its `__call__` has the stock signature: attention modules drop arguments outside of it.
    """
    stock_call = stock_class.__call__
    body = redirected(stock_call) or stock_call

    # Without a closure, which dynamo of PyTorch 2.8 looks for in the class that `__class__` names.
    @functools.wraps(stock_call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer, (stock_call, body) = self._diffaccel_layer, self._diffaccel_calls
        if layer is None:
            return stock_call(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            if body is stock_call:
                return stock_call(self, *args, **kwargs)
            return seam.traced(layer.handle, body, self, *args, **kwargs)
        return layer.process(functools.partial(body, self), args, kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        # What the user sets (IP-Adapter scale, backend) is the stock processor's as well.
        layer = self._diffaccel_layer
        if layer is not None:
            setattr(layer.stock, name, value)
        stock_class.__setattr__(self, name, value)

    members = {
        "__call__": call,
        "__setattr__": set_attribute,
        "__reduce__": _reduce,
        "__module__": __name__,
        # diffusers asks processors for their class: to copy them, to look up what they are.
        "__class__": property(_stock_class),
        "_diffaccel_stock_class": stock_class,
        "_diffaccel_calls": (stock_call, body),
        ATTACHED: None,
    }
    subclass = type(f"Attached{stock_class.__name__}", (stock_class,), members)
    _register_for_guiders(stock_class, subclass)
    return subclass


@functools.cache
def redirected(call: Any) -> Callable[..., Any] | None:
    """Returns the same code with its attention at the seam, None where it calls none itself."""
    code = getattr(call, "__code__", None)
    if code is None or not _ATTENTION_NAMES & set(code.co_names):
        return None
    return _copied(call, _shadow(call.__globals__["__name__"]))


def _copied(function: Any, module: ModuleType) -> FunctionType:
    """Returns the same code with the names of another module."""
    copied = FunctionType(
        function.__code__, vars(module), function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def why_opaque(stock: Any) -> str:
    """Says that a processor calls no attention that could be exchanged."""
    return f"{type(stock).__name__} does not compute its attention with SDPA"


_ATTENTION_NAMES = {"dispatch_attention_fn", "scaled_dot_product_attention"}


@functools.cache
def _shadow(name: str) -> ModuleType:
    """Returns a copy of a module whose attention goes to the seam; dynamo imports it by name."""
    module = sys.modules[name]
    shadow: Any = ModuleType(f"diffaccel_seam.{name}")
    shadow.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
    shadow.__dict__["__builtins__"], shadow.__package__ = builtins, module.__package__
    if module is F:
        shadow.scaled_dot_product_attention = seam.sdpa
    else:
        shadow.dispatch_attention_fn = seam.dispatched
        for key, value in vars(module).items():
            if value is F:
                setattr(shadow, key, _shadow(F.__name__))
            elif isinstance(value, FunctionType) and value.__globals__ is vars(module):
                # Functions that a processor calls (FLUX.2 with cached references).
                if _ATTENTION_NAMES & set(value.__code__.co_names):
                    setattr(shadow, key, _copied(value, shadow))
    sys.modules[shadow.__name__] = shadow
    return shadow


def _build(stock_class: type, attributes: dict[str, Any]) -> Any:
    subclass: Any = attached_class(stock_class)
    processor = subclass.__new__(subclass)
    processor.__dict__.update(attributes)
    return processor


def _reduce(processor: Any) -> tuple[Any, ...]:
    # Generated classes cannot be found by name: copies and pickles name the stock class instead.
    return _build, (type(processor)._diffaccel_stock_class, dict(processor.__dict__))


def _register_for_guiders(stock_class: type, subclass: type) -> None:
    """Tells diffusers' guiders, which look processors up by exact class, about a subclass."""
    try:
        metadata = AttentionProcessorRegistry.get(stock_class)
    except ValueError:
        return
    AttentionProcessorRegistry.register(subclass, metadata)


def _stock_class(processor: Any) -> type:
    # Dynamo looks for methods in the class that an object names: it gets the real one.
    own = type(processor)
    return own._diffaccel_stock_class if TracingContext.try_get() is None else own
