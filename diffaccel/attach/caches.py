"""diffusers' caches on a denoiser: which there are, and a context in which they do not act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CACHES = frozenset(
    {
        "faster_cache",
        "first_block_cache",
        "mag_cache",
        "pyramid_attention_broadcast",
        "sea_cache",
        "taylorseer_cache",
        "text_kv_cache",
    }
)
"""Modules of `diffusers.hooks` whose hooks keep tensors from one call for another."""


def caches_of(model: nn.Module) -> frozenset[str]:
    """Returns which of `CACHES` act on a denoiser, by `enable_cache` or applied by hand."""
    return frozenset(_cache(hook) for hook, _ in _hooks(model)) & CACHES


@contextmanager
def caches_bypassed(model: nn.Module) -> Iterator[None]:
    """While active, every call is computed in full; caches neither answer nor learn of it."""
    references = [reference for hook, reference in _hooks(model) if _cache(hook) in CACHES]
    before = [
        (reference.pre_forward, reference.forward, reference.post_forward)
        for reference in references
    ]
    try:
        for reference in references:
            reference.pre_forward = _same_arguments
            reference.forward = reference.original_forward or reference.forward
            reference.post_forward = _same_output
        yield
    finally:
        for reference, parts in zip(references, before, strict=True):
            reference.pre_forward, reference.forward, reference.post_forward = parts


def _hooks(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yields every diffusers hook of a model, and where its callbacks are called from."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            yield from ((hook, hook.fn_ref) for hook in registry.hooks.values())


def _cache(hook: Any) -> str:
    package, _, module = type(hook).__module__.rpartition(".")
    return module if package == "diffusers.hooks" else ""


def _same_arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return args, kwargs


def _same_output(module: nn.Module, output: Any) -> Any:
    return output
