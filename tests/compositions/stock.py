"""Stock pipelines of a composition: sizes, prompts, scheduler, dtype, adapter, cache."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import diffusers
import torch

from tests.compositions.draw import Composition
from tests.compositions.families import FAMILIES
from tests.support import tiny_pipelines
from tests.support.tiny_pipelines import TinyPipeline

DTYPES = {"fp64": torch.float64, "bf16": torch.bfloat16}
BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks")
SOME_MASK = 0.7  # share of the padded prompts


class NotStockError(Exception):
    """Stock diffusers cannot run a composition."""


def pipeline(drawn: Composition) -> TinyPipeline:
    """Builds the pipeline without adapter and cache, and the arguments of its call."""
    tiny = tiny_pipelines.BUILDERS[drawn.family]()
    tiny.pipe.scheduler = scheduler(drawn, tiny.pipe.scheduler)
    dtype = DTYPES.get(drawn.dtype, torch.float32)
    tiny.pipe.to(dtype=dtype)
    tiny.arguments = arguments(drawn, tiny.arguments, dtype)
    return tiny


def run(drawn: Composition, tiny: TinyPipeline) -> torch.Tensor:
    """Draws once; caches by hand begin anew, as those of pipelines do by themselves."""
    for model in tiny.denoisers().values():
        diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    is_cast = drawn.dtype == "autocast"
    with torch.autocast("cpu", torch.bfloat16) if is_cast else nullcontext():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tiny.sample()


def add_adapter(drawn: Composition, tiny: TinyPipeline) -> None:
    """Puts the adapter on the denoisers."""
    if drawn.adapter is None:
        return
    for model in tiny.denoisers().values():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            _ADAPTERS[drawn.adapter](drawn, tiny, model)


def add_cache(drawn: Composition, tiny: TinyPipeline) -> None:
    """Enables the cache on the denoisers."""
    if drawn.cache is None:
        return
    for model in tiny.denoisers().values():
        config = _CACHES[drawn.cache](drawn, tiny)
        if hasattr(model, "enable_cache"):
            model.enable_cache(config)
        elif drawn.cache == "pyramid_attention_broadcast":
            diffusers.hooks.apply_pyramid_attention_broadcast(model, config)
        else:
            raise NotStockError("U-Nets have no other cache")


def scheduler(drawn: Composition, own: Any) -> Any:
    """Returns the scheduler, given the pipeline's own."""
    if drawn.scheduler is None:
        return own
    name, options = drawn.scheduler
    kept = own.config if drawn.family in ("sd15", "sdxl") else {}
    return getattr(diffusers, name).from_config({**kept, **options})


def arguments(drawn: Composition, template: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of a call, given some of the same pipeline."""
    facts, batch = FAMILIES[drawn.family], drawn.batch
    generator = torch.Generator().manual_seed(drawn.seed + 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def mask(tokens: int) -> torch.Tensor:
        lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
        if torch.rand((), generator=generator) > SOME_MASK:
            lengths = torch.full((batch,), tokens)
        return (torch.arange(tokens) < lengths[:, None]).long()

    found: dict[str, Any] = {
        "height": drawn.rows * facts.pixels,
        "width": drawn.columns * facts.pixels,
        "num_inference_steps": drawn.steps,
        facts.scale[0]: facts.scale[1] if drawn.has_cfg else 1.0,
    }
    copies = "num_videos_per_prompt" if facts.frames else "num_images_per_prompt"
    found[copies] = drawn.per_prompt
    if facts.frames:
        found["num_frames"] = (drawn.frames - 1) * facts.frames + 1
    for sign in ("", "negative_") if drawn.has_cfg else ("",):
        tokens = drawn.negative_text if sign else drawn.text
        for name, value in template.items():
            is_own = isinstance(value, torch.Tensor) and not name.startswith("negative")
            if "prompt" not in name or not is_own:
                continue
            if value.ndim == 3:
                value = random(batch, tokens, value.shape[2])
            elif "mask" in name:
                value = mask(tokens)
            else:
                value = random(batch, value.shape[1])
            if not sign and drawn.guidance and drawn.guidance.own_prompt:
                value = value[:1].expand(value.shape).contiguous()
            found[sign + name] = value
    if drawn.adapter == "ip_adapter":
        rows = 2 if drawn.has_cfg and not facts.calls_apart else 1
        found["ip_adapter_image_embeds"] = [random(rows, 1, 8)]
        if facts.calls_apart and drawn.has_cfg:
            found["negative_ip_adapter_image_embeds"] = [random(1, 1, 8)]
    return found


def _lora(drawn: Composition, tiny: TinyPipeline, model: Any) -> None:
    if importlib.util.find_spec("peft") is None:
        raise NotStockError("peft is not installed")
    from peft import LoraConfig

    names = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))


def _fused(drawn: Composition, tiny: TinyPipeline, model: Any) -> None:
    model.fuse_qkv_projections()


def _ip_adapter(drawn: Composition, tiny: TinyPipeline, model: Any) -> None:
    if drawn.family == "flux":
        size = tiny.pipe.transformer.config.num_attention_heads * 16
        layers, width, step = [(size, size)] * 2, size, 1
        projected = model.config.joint_attention_dim
    elif drawn.family in ("sd15", "sdxl"):
        projected = width = model.config.cross_attention_dim
        step = 2
        layers = [
            (part.to_k.out_features, width)
            for name, part in model.named_modules()
            if name.endswith("attn2")
        ]
    else:
        raise NotStockError("no IP-Adapter of this family is tried")
    ip = {
        f"{index * step + (step == 2)}.to_{part}_ip.{kind}": torch.randn(
            *shape if kind == "weight" else shape[:1]
        )
        for index, shape in enumerate(layers)
        for part in "kv"
        for kind in ("weight", "bias")[: 1 + (step == 1)]
    }
    image = {
        "proj.weight": torch.randn(4 * projected, 8),
        "proj.bias": torch.randn(4 * projected),
        "norm.weight": torch.ones(projected),
        "norm.bias": torch.zeros(projected),
    }
    states = [{"image_proj": image, "ip_adapter": ip}]
    model._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    model.to(DTYPES.get(drawn.dtype, torch.float32))


def _slicing(drawn: Composition, tiny: TinyPipeline, model: Any) -> None:
    if not hasattr(model, "set_attention_slice"):
        raise NotStockError("only U-Nets slice attention")
    model.set_attention_slice(1)


def _offloaded(drawn: Composition, tiny: TinyPipeline, model: Any) -> None:
    level = ("block_level", "leaf_level")[drawn.seed % 2]
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    diffusers.hooks.apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type=level, **blocks
    )


def _cast(drawn: Composition, tiny: TinyPipeline, model: Any) -> None:
    dtype = DTYPES.get(drawn.dtype, torch.float32)
    model.enable_layerwise_casting(torch.float8_e4m3fn, dtype)


_ADAPTERS = {
    "lora": _lora,
    "fused_qkv": _fused,
    "ip_adapter": _ip_adapter,
    "attention_slicing": _slicing,
    "group_offload": _offloaded,
    "layerwise_casting": _cast,
}


def _pyramid(drawn: Composition, tiny: TinyPipeline) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=BLOCKS,
        current_timestep_callback=lambda: 500,
    )


def _faster(drawn: Composition, tiny: TinyPipeline) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=BLOCKS,
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: tiny.pipe.current_timestep,
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=not (drawn.has_cfg and drawn.family == "cogvideox"),
        tensor_format="BFCHW" if drawn.family == "cogvideox" else "BCFHW",
    )


_CACHES = {
    "pyramid_attention_broadcast": _pyramid,
    "faster_cache": _faster,
    "first_block_cache": lambda drawn, tiny: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "mag_cache": lambda drawn, tiny: diffusers.MagCacheConfig(
        mag_ratios=torch.ones(40), num_inference_steps=drawn.steps, retention_ratio=0.2
    ),
    "taylorseer_cache": lambda drawn, tiny: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1
    ),
    "sea_cache": lambda drawn, tiny: diffusers.SeaCacheConfig(threshold=0.5),
}
