"""Caches of diffusers and cache-dit on tiny pipelines, strong enough to act within a few steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import torch
from diffusers import hooks
from tiny_pipelines import BUILDERS, TinyPipeline

STEPS = 6
IDENTIFIERS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def _pyramid(tiny: TinyPipeline) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=IDENTIFIERS,
        current_timestep_callback=lambda: 500,
    )


def _faster(tiny: TinyPipeline) -> Any:
    batches = tiny.family == "cogvideox"  # both prompts, of latents that can be transformed
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=IDENTIFIERS,
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: 500 if batches else tiny.pipe.current_timestep,
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=not batches,
        tensor_format="BFCHW" if batches else "BCFHW",
    )


CACHES: dict[str, tuple[Callable[..., Any], Callable[[TinyPipeline], Any]]] = {
    "pyramid_attention_broadcast": (hooks.apply_pyramid_attention_broadcast, _pyramid),
    "faster_cache": (hooks.apply_faster_cache, _faster),
    "first_block_cache": (
        hooks.apply_first_block_cache,
        lambda tiny: diffusers.FirstBlockCacheConfig(threshold=2.0),
    ),
    "mag_cache": (
        hooks.apply_mag_cache,
        lambda tiny: diffusers.MagCacheConfig(
            mag_ratios=torch.ones(40), num_inference_steps=STEPS, retention_ratio=0.2
        ),
    ),
    "taylorseer_cache": (
        hooks.apply_taylorseer_cache,
        lambda tiny: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1
        ),
    ),
    "sea_cache": (hooks.apply_sea_cache, lambda tiny: diffusers.SeaCacheConfig(threshold=2.0)),
}
"""Name in `caches_of` -> how it is applied to a model, and its configuration for a pipeline."""

DIT = "cache_dit"
"""The cache of the package of that name, which is applied to whole pipelines."""

_UNETS = {"sd15", "sdxl"}
_WANS = {"wan2.1", "wan2.2", "wan2.2-ti2v"}
RUNS: dict[str, set[str]] = {
    "pyramid_attention_broadcast": set(BUILDERS) - {"qwen"},  # one cache for texts of two lengths
    "faster_cache": {"flux", "wan2.1", "wan2.2-ti2v", "hunyuan", "cogvideox", "ltx"},  # fmt: skip
    "first_block_cache": set(BUILDERS) - {"sd3", *_UNETS},
    "mag_cache": set(BUILDERS) - _UNETS,
    "taylorseer_cache": {"flux", "qwen", "hunyuan"},
    "sea_cache": _WANS,
    DIT: set(BUILDERS) - _UNETS,
}
"""The families on which a cache runs in stock diffusers and changes what is drawn. TextKVCache is
for one model alone, which no binding knows."""

PAIRS = [(name, cache) for cache, names in RUNS.items() for name in BUILDERS if name in names]


class Cached:
    """A tiny pipeline with a cache that can be switched on and off. A context manager."""

    def __init__(self, name: str, cache: str) -> None:
        if cache == DIT:
            pytest.importorskip(DIT, reason="cache-dit is not installed")
        self.tiny = BUILDERS[name]()
        self.cache = cache
        self._off = ExitStack()

    def __enter__(self) -> Cached:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def enable(self) -> None:
        """Switches the cache on, in every denoiser."""
        pipe = self.tiny.pipe
        if self.cache == DIT:
            import cache_dit

            self._off.callback(cache_dit.disable_cache, pipe)  # it changes the pipeline's class
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1,
                residual_diff_threshold=2.0,
            )  # fmt: skip
            cache_dit.enable_cache(pipe, cache_config=config)
            return
        apply, config_for = CACHES[self.cache]
        for model in self.tiny.denoisers().values():
            if hasattr(model, "enable_cache"):
                model.enable_cache(config_for(self.tiny))
                self._off.callback(model.disable_cache)
            else:
                apply(model, config_for(self.tiny))
                self._off.callback(_remove_hooks, model)

    def disable(self) -> None:
        """Switches the cache off."""
        self._off.close()

    def sample(self, **changes: Any) -> torch.Tensor:
        """Runs the pipeline from an empty cache; U-Nets do not empty theirs themselves."""
        for model in self.tiny.denoisers().values():
            hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        return self.tiny.sample(num_inference_steps=STEPS, **changes)


def _remove_hooks(model: torch.nn.Module) -> None:
    """Takes a model's caches off, as `disable_cache` does where a model has it."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in () if registry is None else tuple(registry.hooks):
            registry.remove_hook(name, recurse=False)
