"""The attention seam: the one place where attached layers meet diffusers' attention.

An attached processor runs the body of its stock class with two names exchanged: diffusers'
`dispatch_attention_fn` and `F.scaled_dot_product_attention`. Both make an `AttentionCall` of
their arguments and hand it to the layer, whose method and hooks answer it. While torch.compile
traces, they emit one opaque operation instead, which finds the layer at run time by its handle:
step, layout, schedule and records never enter a graph.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.attach.context_parallel import attend_in_parallel
from diffaccel.attach.finite import checked
from diffaccel.attach.key_padding import KeyPadding
from diffaccel.errors import ModelError
from diffaccel.kernels.arguments import Tensors
from diffaccel.methods.inputs import as_autocast, is_autocast, need_gradients

if TYPE_CHECKING:
    from diffaccel.attach.state import DenoiserState
    from diffaccel.bindings import AttentionLayer


class AttachedLayer:
    """What an attached processor knows: its stock processor, its layer, the denoiser's state.

    Args:
        stock: The processor that it stands for.
        layer: The layer.
        state: What acts at the attention of the denoiser.

    Attributes:
        handle: 0-dim int64 CPU tensor by which the opaque operation finds this object: an input
            of a graph, whose value is never guarded, so that all layers share one graph.
    """

    __slots__ = ("__weakref__", "handle", "layer", "state", "stock")

    def __init__(self, stock: Any, layer: AttentionLayer, state: DenoiserState) -> None:
        self.__setstate__((stock, layer, state))

    def __getstate__(self) -> tuple[Any, AttentionLayer, DenoiserState]:
        return self.stock, self.layer, self.state

    def __setstate__(self, parts: tuple[Any, AttentionLayer, DenoiserState]) -> None:
        # A copied model gets handles of its own.
        self.stock, self.layer, self.state = parts
        number = next(_NUMBERS)
        self.handle = torch.tensor(number, device="cpu")
        _LAYERS[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (), self.__getstate__()

    def process(self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the layer: `run(*args, **kwargs)` is its stock body with attention exchanged."""
        for hook in self.active_hooks():
            if hook.wraps_processor:

                def whole(*args: Any, **kwargs: Any) -> Any:
                    return self._run(run, args, kwargs)

                return hook.process(self, whole, args, kwargs)
        return self._run(run, args, kwargs)

    def attend(self, call: AttentionCall) -> Tensor:
        """Answers one attention call, (B, N, H, D)."""
        compute: Compute = self.state.attend
        for hook in self.active_hooks():
            compute = partial(hook.attend, compute=compute)
        method = self.state.method
        if method is not None and method.check:
            compute = partial(checked, compute=compute, step=method.clock.step)
        is_split = self.state.context is not None
        return attend_in_parallel(call, compute) if is_split else compute(call)

    def active_hooks(self) -> list[AttentionHook]:
        """Returns what acts at the layer beside the method at present, outermost last."""
        return [hook for hook in self.state.hooks.get(self.layer.name, ()) if hook.is_active]

    def _run(self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if self.state.binding.writes_masks_out and mask is not None:
            kwargs = kwargs | {"attention_mask": mask.as_subclass(KeyPadding)}
        outer = _RUNNING.layer, _RUNNING.index
        _RUNNING.layer, _RUNNING.index = self, 0
        try:
            output = run(*args, **kwargs)
            if _RUNNING.index == 0:
                self.state.never_called(self)
            return output
        finally:
            _RUNNING.layer, _RUNNING.index = outer


def _blank() -> AttachedLayer:
    return AttachedLayer.__new__(AttachedLayer)


_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, AttachedLayer] = weakref.WeakValueDictionary()


class _Running(threading.local):
    """The layer that runs in this thread, and how many attention calls it has made."""

    layer: Any = None
    index: int = 0


class _Traced:
    """The layer whose body torch.compile traces; its assignments become none of a graph's."""

    handle: Any = None
    index: int = 0


_RUNNING = _Running()
_TRACED = _Traced()


def dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **arguments: Any,
) -> Tensor:
    """Stands for diffusers' `dispatch_attention_fn` in the bodies of attached processors."""
    enable_gqa = arguments.pop("enable_gqa", False)
    if torch.compiler.is_compiling():
        is_foreign = attn_mask is not None and not isinstance(attn_mask, Tensor)  # as flex
        if dropout_p or is_causal or is_foreign or _is_learned(attn_mask):
            return dispatch_attention_fn(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **arguments
            )
        return _traced(query, key, value, attn_mask, scale, True)
    options = _options(dropout_p, is_causal, enable_gqa)
    return _run(query, key, value, attn_mask, scale, options, arguments)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **arguments: Any,
) -> Tensor:
    """Stands for `F.scaled_dot_product_attention` in the bodies of attached processors."""
    enable_gqa = arguments.pop("enable_gqa", False)
    tracing = torch.compiler.is_compiling()
    if tracing and (dropout_p or is_causal or _is_learned(attn_mask)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if tracing:
        return _traced(query, key, value, attn_mask, scale, False).transpose(1, 2)
    options = _options(dropout_p, is_causal, enable_gqa)
    return _run(query, key, value, attn_mask, scale, options, None).transpose(1, 2)


def traced(handle: Tensor, body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Lets torch.compile trace the body of the layer with this handle."""
    _TRACED.handle, _TRACED.index = handle, 0
    output = body(*args, **kwargs)
    _TRACED.handle = None
    return output


def _options(dropout_p: float, is_causal: bool, enable_gqa: bool) -> dict[str, Any]:
    if not (dropout_p or is_causal or enable_gqa):
        return {}
    return {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    options: dict[str, Any],
    dispatch: dict[str, Any] | None,
) -> Tensor:
    attached, index = _RUNNING.layer, _RUNNING.index
    _RUNNING.index = index + 1
    mask = mask.of_keys if isinstance(mask, KeyPadding) else mask
    gradients = need_gradients(query, key, value)
    device = query.device.type
    if not is_autocast(device):
        return attached.attend(
            AttentionCall(
                attached, index, query, key, value, mask, scale, options, dispatch, gradients
            )
        )
    query, key, value, mask = as_autocast(query, key, value, mask)
    call = AttentionCall(
        attached, index, query, key, value, mask, scale, options, dispatch, gradients
    )
    with torch.autocast(device, enabled=False):  # no product of a method is cast again
        return attached.attend(call)


def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_dispatched: bool,
) -> Tensor:
    place = 8 * _TRACED.index + 2 * need_gradients(query, key, value) + is_dispatched
    place += 4 * (query.shape[2] != key.shape[2])
    _TRACED.index += 1
    query, key, value, mask = as_autocast(query, key, value, mask)
    return torch.ops.diffaccel.attend(query, key, value, mask, scale, _TRACED.handle, place)


# A method may wait for the device or choose a kernel by its data: never replay it from a graph.
_TAGS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("diffaccel::attend", mutates_args=(), **_TAGS)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],  # noqa: UP045 - torch 2.6 reads no unions in schemas
    scale: Optional[float],  # noqa: UP045
    handle: Tensor,
    place: int,
) -> Tensor:
    """Answers an attention call of a compiled graph.

    `place` is 8 * index + 4 * enable_gqa + 2 * needs_gradients + is_dispatched.
    """
    call = _call(query, key, value, mask, scale, handle, place)
    if call.needs_gradients and call.attached.active_hooks():
        raise ModelError(
            f"attention of {call.layer.name} is guided, which has no gradients in a compiled "
            "model; end the guidance, or do not compile"
        )
    return call.attached.attend(call).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("diffaccel::attend_backward", mutates_args=(), **_TAGS)
def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rest: Tensors,
    scale: Optional[float],  # noqa: UP045
    place: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of query, key and value: what was computed is dense attention."""
    mask, handle = rest
    # An operation runs below autograd, which is switched on again for the recomputation.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        output = _call(query, key, value, mask, scale, handle, place).dense()
        query, key, value = torch.autograd.grad(output, (query, key, value), gradient)
    return query.contiguous(), key.contiguous(), value.contiguous()


@_attend_backward.register_fake
def _(gradient: Tensor, *tokens: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.new_empty(x.shape) for x in tokens[:3])
    return query, key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, ctx.scale, handle, ctx.place = inputs
    ctx.save_for_backward(query, key, value, mask, handle)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.place & 2:
        raise RuntimeError(
            "attention of an attached layer was computed without gradients; compute it with "
            "gradients enabled and a query, key or value that requires them"
        )
    query, key, value, *rest = ctx.saved_tensors
    gradients = torch.ops.diffaccel.attend_backward(
        gradient, query, key, value, rest, ctx.scale, ctx.place
    )
    return (*gradients, None, None, None, None)


_attend.register_autograd(_backward, setup_context=_save)


def _call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None,
    handle: Any, place: int,
) -> AttentionCall:  # fmt: skip
    """Makes the call of a compiled graph."""
    attached = _LAYERS[int(handle)]
    dispatch = None
    if place & 1:
        backend = getattr(attached.stock, "_attention_backend", None)
        if backend == "flex" and mask is None:
            backend = None  # inside an operation nothing compiles it
        dispatch = {
            "backend": backend,
            "parallel_config": getattr(attached.stock, "_parallel_config", None),
        }
    options = _options(0.0, False, bool(place & 4))
    return AttentionCall(
        attached, place // 8, query, key, value, mask, scale, options, dispatch, bool(place & 2)
    )


def _is_learned(mask: Tensor | None) -> bool:
    """Whether a mask has gradients, which the opaque operation does not compute."""
    return isinstance(mask, Tensor) and torch.is_grad_enabled() and mask.requires_grad
