"""Sets caches and sparse attention against each other, and one beside the other.

Caches leave out attention and blocks whose outputs changed little since an earlier step, sparse
methods a part of each attention. Each cache of diffusers that runs on a model, and cache-dit where
it is installed, with dense attention and with a method; time and distance to dense attention
without a cache, same prompt and noise:

    python benchmarks/studies/caches.py --csv benchmarks/results/caches-cpu.csv --sheet caches.jpg

The transformer refines its own picture of 256 x 256 at 1024 x 1024, from the middle of the
schedule; the U-Net draws at 512 x 512 and the video model at its own 128 x 128, from noise. What
is measured is the processor time of the pipeline's call up to its latents, on one thread
(`OMP_NUM_THREADS=1`), which other work on the machine disturbs least. Variants take turns within
each prompt, so that a ratio compares neighbours in time.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import hooks
from torch import Tensor

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.benchmarks.rows import Column, table, write_rows
from diffaccel.machine import device_name, versions_line
from diffaccel.methods import (
    AgentAttn,
    FullAttn,
    Method,
    NeighborhoodAttn,
)
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE, EMBEDDED_UNET, EMBEDDED_VIDEO
from diffaccel.pipelines.loading import load_image_pipeline, load_video_pipeline
from diffaccel.quality.contact_sheet import Shown, write_sheet
from diffaccel.quality.pictures import psnr

DENSE = FullAttn()
PICTURES = (
    "a red apple on a blue background",
    "a rocket on a white background",
    "a cat on a green background",
    "a sailboat on a yellow background",
)
CLIPS = (
    "a red apple turns on a blue background",
    "a rocket flies to the left",
    "a star turns on a purple background",
    "a car drives to the left on a yellow background",
)


@dataclass
class Run:
    """One pipeline, and what happens in one call of it.

    Args:
        pipe: The pipeline.
        draw: Draws latents for a prompt and a seed, given a `callback_on_step_end`, and what
            `start` returned.
        show: Decodes them: (F, H, W, 3) uint8.
        steps: Denoising steps that run.
        size: Of a picture in pixels.
        methods: What is compared, dense first.
        prompts: What is drawn, prompt after prompt.
        start: What a prompt and a seed begin from; computed before the time is taken.
    """

    pipe: Any
    draw: Callable[..., Tensor]
    show: Callable[[Tensor], np.ndarray]
    steps: int
    size: str
    methods: tuple[Method, ...]
    prompts: tuple[str, ...]
    start: Callable[[str, int], dict[str, Any]] = lambda prompt, seed: {}
    timestep: float = field(default=1000.0, init=False)

    @property
    def model(self) -> Any:
        """The denoiser."""
        return getattr(self.pipe, "transformer", None) or self.pipe.unet

    def next_timestep(self, pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        """Tells caches where the schedule is, as a `callback_on_step_end`."""
        following = pipe.scheduler.timesteps[step + 1 :]
        self.timestep = float(following[0]) if len(following) else 0.0
        return kwargs


@dataclass(frozen=True, slots=True)
class Row:
    """One model with a cache and a method, over all prompts.

    Args:
        model: "image", "unet" or "video".
        size: In pixels.
        steps: Denoising steps.
        cache: "none", or which.
        method: repr.
        prompts: Number of prompts.
        attention_calls: Share of the attention calls without a cache.
        density: Share of the pairs that those calls computed.
        seconds: Median processor time of a picture's denoising.
        speed_up: Median ratio to dense attention without a cache, of the same prompt.
        psnr: Mean in dB to dense attention without a cache.
    """

    key = ("model", "size", "cache", "method")

    model: str
    size: str
    steps: int
    cache: str
    method: str
    prompts: int
    attention_calls: float
    density: float
    seconds: float
    speed_up: float
    psnr: float


def _pyramid(run: Run) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: int(run.timestep)
    )
    hooks.apply_pyramid_attention_broadcast(run.model, config)


def _faster(run: Run) -> None:
    config = diffusers.FasterCacheConfig(
        current_timestep_callback=lambda: int(run.timestep),
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,  # both prompts come in calls of their own
    )
    hooks.apply_faster_cache(run.model, config)


def _first_block(run: Run) -> None:
    hooks.apply_first_block_cache(run.model, diffusers.FirstBlockCacheConfig(threshold=0.1))


def _magnitudes(run: Run) -> None:
    config = diffusers.MagCacheConfig(mag_ratios=[1.0] * 50, num_inference_steps=run.steps)
    hooks.apply_mag_cache(run.model, config)


def _taylor(run: Run) -> None:
    hooks.apply_taylorseer_cache(run.model, diffusers.TaylorSeerCacheConfig(cache_interval=3))


def _spectral(run: Run) -> None:
    hooks.apply_sea_cache(run.model, diffusers.SeaCacheConfig())


def _dual_block(run: Run) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=3, residual_diff_threshold=0.12
    )
    cache_dit.enable_cache(run.pipe, cache_config=config)


CACHES: dict[str, tuple[Callable[[Run], None], tuple[str, ...]]] = {
    "none": (lambda run: None, ("image", "unet", "video")),
    "PyramidAttentionBroadcast": (_pyramid, ("image", "unet", "video")),
    "FasterCache": (_faster, ("image", "video")),
    "FirstBlockCache": (_first_block, ("image", "video")),
    "MagCache": (_magnitudes, ("image", "video")),
    "TaylorSeer": (_taylor, ("image",)),
    "SeaCache": (_spectral, ("video",)),
    "cache-dit": (_dual_block, ("image", "video")),
}
"""Name -> how it is applied, and the models on which it runs in stock diffusers. MagCache has no
ratios measured for these models: it takes magnitudes as constant."""


@contextmanager
def caching(run: Run, name: str) -> Iterator[None]:
    """A fresh cache for a `with` block."""
    try:
        CACHES[name][0](run)
        hooks.HookRegistry.check_if_exists_or_initialize(
            run.model
        ).invalidate_child_registries_cache()
        yield
    finally:
        if name == "cache-dit":
            import cache_dit

            cache_dit.disable_cache(run.pipe)
        for module in run.model.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            for hook in () if registry is None else tuple(registry.hooks):
                registry.remove_hook(hook, recurse=False)


def image_run(size: int = 1024, steps: int = 12) -> Run:
    """The embedded transformer, refining its picture of 256 x 256."""
    pipe: Any = load_image_pipeline(EMBEDDED_IMAGE)
    sigmas = np.linspace(0.5, 0.5 / steps, steps)  # the scheduler shifts them

    def draw(prompt: str, seed: int, callback: Any, picture: Tensor) -> Tensor:
        shift = pipe.scheduler.config.shift
        first = float(shift * sigmas[0] / (1 + (shift - 1) * sigmas[0]))
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
        return pipe(
            prompt, width=size, height=size, num_inference_steps=steps, sigmas=sigmas,
            latents=(1 - first) * picture + first * noise, output_type="latent",
            max_sequence_length=32, callback_on_step_end=callback,
        ).images  # fmt: skip

    def show(latents: Tensor) -> np.ndarray:
        config = pipe.vae.config
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
        latents = latents / config.scaling_factor + config.shift_factor
        return _pixels(pipe.vae.decode(latents, return_dict=False)[0])

    return Run(
        pipe, draw, show, steps, f"{size}x{size}", (DENSE, NeighborhoodAttn(16)), PICTURES,
        lambda prompt, seed: {"picture": _enlarged(prompt, seed, size)},
    )  # fmt: skip


@functools.cache
def _enlarged(prompt: str, seed: int, size: int) -> Tensor:
    """A native picture of the embedded transformer, enlarged, as packed latents (1, N, C)."""
    pipe: Any = load_image_pipeline(EMBEDDED_IMAGE)
    picture = pipe(
        prompt, width=256, height=256, num_inference_steps=20, negative_prompt="",
        true_cfg_scale=3.0, max_sequence_length=32,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    config, pixels = pipe.vae.config, pipe.image_processor.preprocess(picture.resize((size, size)))
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    latents = (latents - config.shift_factor) * config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


def unet_run(size: int = 512, steps: int = 20) -> Run:
    """The embedded U-Net, from noise."""
    pipe: Any = load_image_pipeline(EMBEDDED_UNET)

    def draw(prompt: str, seed: int, callback: Any) -> Tensor:
        return pipe(
            prompt, width=size, height=size, num_inference_steps=steps, guidance_scale=3.0,
            negative_prompt="", generator=torch.Generator().manual_seed(seed),
            output_type="latent", callback_on_step_end=callback,
        ).images  # fmt: skip

    def show(latents: Tensor) -> np.ndarray:
        return _pixels(pipe.vae.decode(latents / pipe.vae.config.scaling_factor)[0])

    methods = (DENSE, AgentAttn())
    return Run(pipe, draw, show, steps, f"{size}x{size}", methods, PICTURES)


def video_run(size: int = 128, steps: int = 20) -> Run:
    """The embedded video model, 17 frames from noise."""
    pipe: Any = load_video_pipeline(EMBEDDED_VIDEO)

    def draw(prompt: str, seed: int, callback: Any) -> Tensor:
        return pipe(
            prompt, width=size, height=size, num_frames=17, num_inference_steps=steps,
            guidance_scale=3.0, negative_prompt="",
            generator=torch.Generator().manual_seed(seed), output_type="latent",
            callback_on_step_end=callback,
        ).frames  # fmt: skip

    def show(latents: Tensor) -> np.ndarray:
        config = pipe.vae.config
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return _pixels(pipe.vae.decode(latents * deviation + mean)[0])

    methods = (DENSE, NeighborhoodAttn((5, 4, 4)))
    return Run(pipe, draw, show, steps, f"17x{size}x{size}", methods, CLIPS)


def _pixels(decoded: Tensor) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 of a decoded picture (1, 3, H, W) or clip (1, 3, F, H, W)."""
    frames = decoded if decoded.ndim == 4 else decoded[0].transpose(0, 1)
    pixels = (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    return pixels.round().byte().numpy()


RUNS: Mapping[str, Callable[..., Run]] = {
    "image": image_run,
    "unet": unet_run,
    "video": video_run,
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture of one variant."""

    seconds: float
    calls: int
    density: float
    frames: np.ndarray


@torch.no_grad()
def drawn(run: Run, cache: str, method: Method, prompt: str, seed: int) -> Drawn:
    """Draws and times one picture or clip."""
    run.timestep = 1000.0
    start = run.start(prompt, seed)
    with caching(run, cache), set_attn_processor(run.pipe, method) as attachment:
        started = process_time()
        latents = run.draw(prompt, seed, run.next_timestep, **start)
        seconds = process_time() - started
        report = attachment.report()
    return Drawn(seconds, report.calls, report.density or 1.0, run.show(latents))


def model_rows(
    name: str, count: int, settings: Mapping[str, int]
) -> Iterator[tuple[list[Row], list[Shown]]]:
    """Measures all variants of one model, and yields what is known after each prompt.

    Args:
        name: Of `RUNS`.
        count: Prompts, 1 to 4.
        settings: Arguments of the run, where they are not the defaults.

    Yields:
        Rows over all prompts so far, and the pictures of the latest.
    """
    run = RUNS[name](**settings)
    caches = [
        cache
        for cache, (_, models) in CACHES.items()
        if name in models and (cache != "cache-dit" or find_spec("cache_dit"))
    ]
    # What cache-dit changes about a model does not end with it: that gets a pipeline of its own.
    apart = RUNS[name](**settings) if "cache-dit" in caches else run
    variants = [(cache, method) for method in run.methods for cache in caches]
    found: dict[tuple[str, Method], list[Drawn]] = {variant: [] for variant in variants}
    drawn(run, *variants[0], run.prompts[0], 0)  # warms up
    for number, prompt in enumerate(run.prompts[:count]):
        turn = number * len(variants) // count  # no variant always runs first
        for variant in variants[turn:] + variants[:turn]:
            place = apart if variant[0] == "cache-dit" else run
            latest = drawn(place, *variant, prompt, number)
            found[variant].append(latest)
            print(name, prompt, *variant, f"{latest.seconds:.1f} s", file=sys.stderr, flush=True)
        exact = found[variants[0]]
        yield (
            [_row(name, run, *variant, found[variant], exact) for variant in variants],
            [
                Shown(
                    f"{name} {run.size}: {prompt}; {type(method).__name__}", cache,
                    f"{psnr(pictures[-1].frames, exact[-1].frames):.1f} dB, "
                    f"{pictures[-1].seconds:.1f} s",
                    pictures[-1].frames,
                )
                for (cache, method), pictures in found.items()
            ],
        )  # fmt: skip


def _row(
    name: str, run: Run, cache: str, method: Method, pictures: list[Drawn], exact: list[Drawn]
) -> Row:
    pairs = list(zip(exact, pictures, strict=True))
    return Row(
        model=name,
        size=run.size,
        steps=run.steps,
        cache=cache,
        method=repr(method),
        prompts=len(pictures),
        attention_calls=sum(x.calls for x in pictures) / sum(x.calls for x in exact),
        density=fmean(x.density for x in pictures),
        seconds=median(x.seconds for x in pictures),
        speed_up=median(dense.seconds / x.seconds for dense, x in pairs),
        psnr=fmean(psnr(x.frames, dense.frames) for dense, x in pairs),
    )


COLUMNS: dict[str, Column] = {
    "model": "{0.model}",
    "size": "{0.size}",
    "cache": "{0.cache}",
    "method": "`{0.method}`",
    "attention calls": "{0.attention_calls:.0%}",
    "pairs of a call": "{0.density:.1%}",
    "seconds": "{0.seconds:.1f}",
    "times as fast": "{0.speed_up:.2f}",
    "PSNR": "{0.psnr:.1f} dB",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes table and sheet where asked."""
    options = _parser().parse_args(argv)
    facts = {"device": device_name("cpu"), "dtype": "float32", "versions": versions_line()}
    facts["versions"] += f", cache-dit {_cache_dit_version()}"
    rows: list[Row] = []
    shown: list[Shown] = []
    for name in options.models:
        asked = {"steps": options.steps, "size": options.size}
        settings = {key: value for key, value in asked.items() if value is not None}
        found: list[Row] = []
        for found, pictures in model_rows(name, options.count, settings):
            shown += pictures
            if options.csv:
                write_rows(options.csv, found, facts)
            if options.sheet:
                write_sheet(options.sheet, shown, tuple(CACHES))
        rows += found
    print("\n".join(table(rows, COLUMNS)))
    return 0


def _cache_dit_version() -> str:
    if find_spec("cache_dit") is None:
        return "not installed"
    import cache_dit

    return cache_dit.__version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--count", type=int, default=4, help="prompts of each model, 1 to 4")
    parser.add_argument("--size", type=int, help="side in pixels (default: each model's own)")
    parser.add_argument("--steps", type=int, help="that run (default: each model's own)")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--sheet", type=Path, help="contact sheet, .jpg")
    return parser


if __name__ == "__main__":
    sys.exit(main())
