"""Caches on a denoiser: which there are, and a context in which they do not act.

Those of diffusers, and cache-dit (https://github.com/vipshop/cache-dit). A method needs none of
this: caches leave attention calls out, and it answers those that come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffaccel.errors import ModelError

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

READS_CONTEXT = frozenset({"first_block_cache", "sea_cache", "taylorseer_cache"})
"""Those of `CACHES` that pipelines have to tell which prompt they ask for."""

CACHE_DIT = "cache_dit"
"""The package whose cache exchanges a denoiser's `forward`."""


def caches_of(model: nn.Module) -> frozenset[str]:
    """Returns which of `CACHES` and `CACHE_DIT` act on a denoiser, however they got there."""
    found = frozenset(_cache(hook) for hook, _ in _hooks(model)) & CACHES
    return found if _uncached_forward(model) is None else found | {CACHE_DIT}


def refuse_caches(model: nn.Module, why: str, caches: frozenset[str], instead: str = "") -> None:
    """Raises ModelError where there are caches that cannot follow what is done with a denoiser.

    Args:
        model: The denoiser.
        why: What they cannot follow, such as "two paths change the batch".
        caches: Those that cannot, of `caches_of`.
        instead: What else than ending the cache could be done.
    """
    if caches:
        ends = ["cache_dit.disable_cache(pipe)"] * (CACHE_DIT in caches)
        ends = ["disable_cache()"] * bool(caches - {CACHE_DIT}) + ends
        raise ModelError(
            f"{why} of {type(model).__name__}, which {' and '.join(sorted(caches))} cannot "
            f"follow; call {' and '.join(ends)}{instead}"
        )


@contextmanager
def caches_bypassed(model: nn.Module) -> Iterator[None]:
    """While active, every call is computed in full; caches neither answer nor learn of it."""
    references: list[Any] = [ref for hook, ref in _hooks(model) if _cache(hook) in CACHES]
    denoiser: Any = model
    patched, uncached = denoiser.forward, _uncached_forward(model)
    before = [
        (reference.pre_forward, reference.forward, reference.post_forward)
        for reference in references
    ]
    try:
        if uncached is not None:
            denoiser.forward = uncached
        for reference in references:
            reference.pre_forward = _same_arguments
            reference.forward = reference.original_forward or reference.forward
            reference.post_forward = _same_output
        yield
    finally:
        if uncached is not None:
            denoiser.forward = patched
        for reference, parts in zip(references, before, strict=True):
            reference.pre_forward, reference.forward, reference.post_forward = parts


def _hooks(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yields every diffusers hook of a model, and where its callbacks are called from."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            yield from ((hook, hook.fn_ref) for hook in registry.hooks.values())


def _uncached_forward(model: nn.Module) -> Any:
    """Returns the `forward` that cache-dit has exchanged, None where it has not."""
    return (
        getattr(model, "_original_forward", None) if getattr(model, "_is_cached", False) else None
    )


def _cache(hook: Any) -> str:
    package, _, module = type(hook).__module__.rpartition(".")
    return module if package == "diffusers.hooks" else ""


def _same_arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return args, kwargs


def _same_output(module: nn.Module, output: Any) -> Any:
    return output
