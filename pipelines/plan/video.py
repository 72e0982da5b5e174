"""Predicts what the generation of a video will compute, from a pipeline's configuration alone."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from diffaccel.bindings import binding_of
from diffaccel.pipelines.plan.image import (
    Phase,
    Plan,
    Shares,
    dtype_on,
    parameter_count,
    shares_of,
)
from diffaccel.pipelines.plan.memory import PROGRAM, tokens_memory, weights_memory
from diffaccel.pipelines.plan.operations import other_flop, served_layers
from diffaccel.pipelines.plan.skeleton import Outline
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.generate import (
    check_video_size,
    check_windows,
    family_of,
    latent_size,
    native_size,
    pixels_per_token,
)
from diffaccel.pipelines.video.job import VideoJob
from diffaccel.pipelines.video.long_video import TimeWindows
from diffaccel.pipelines.windows import throughout

NOTE = "the video autoencoder is not counted"


def plan_video(outline: Outline, job: VideoJob, *, device: str = "cpu") -> Plan:
    """Plans what `generate_video` will do with the same job.

    Args:
        outline: A video pipeline.
        job: What happens, and how it is made.
        device: Where it will run.

    Raises:
        InputError: A size breaks the rule of `check_video_size`.
    """
    check_video_size(outline, *job.size, job.frames)
    if isinstance(job.recipe, TimeWindows):
        check_windows(outline.class_name)
        phases = [_windows_phase(outline, job, job.recipe, device)]
    else:
        native = replace(job, size=job.native or native_size(outline, *job.size))
        rows = job.steps * _prompts(job.recipe)
        phases = [_phase(outline, native, "sample", job.steps, rows, device)]
        for stage in job.stages(native.size, pixels_per_token(outline)):
            phases.append(_refined_phase(outline, stage, job.recipe, device))
    return Plan(tuple(phases), parameter_count(outline), (NOTE,))


def _prompts(recipe: FreeSwim | TimeWindows) -> int:
    """Prompts that each step asks about."""
    return 2 if recipe.guidance_scale > 1.0 else 1


def _phase(
    outline: Outline, job: VideoJob, verb: str, steps: int, rows: int, device: str
) -> Phase:
    """A phase of stock attention; the others change what they do differently."""
    model = next(iter(outline.denoisers.values()))
    latents = latent_size(outline, job.size, job.frames)
    text = text_of(outline)
    layers = served_layers(model, latents, text)
    layout = layers[0].layout
    return Phase(
        name=f"{verb} {job.label}, {job.frames} frames",
        size=job.size,
        frames=job.frames,
        steps=steps,
        rows=rows,
        dense_rows=rows,
        grid=layout.grid,
        text=layout.length - layout.visual.length,
        method="stock",
        shares=Shares(),
        attention_flop=sum(served.dense_flop for served in layers),
        other_flop=other_flop(model, latents, text),
        autoencoder_flop=None,
        memory=_memory(outline, job, tokens_memory(layers, dtype_on(device), 1), device),
    )


def _refined_phase(outline: Outline, job: VideoJob, recipe: FreeSwim, device: str) -> Phase:
    """Windows for both prompts at every step, and full attention at every guided one."""
    steps = recipe.executed_steps
    prompts = _prompts(recipe)
    stock = _phase(outline, job, "refine to", steps, steps * prompts, device)
    model, dtype = next(iter(outline.denoisers.values())), dtype_on(device)
    layers = served_layers(model, latent_size(outline, job.size, job.frames), text_of(outline))
    method, ran = throughout(recipe.method), range(recipe.steps - steps, recipe.steps)
    windows, _ = shares_of(method, layers, model, outline, ran, device, always=True)
    every = recipe.guide_every if binding_of(model).text_layers(model) else None
    guided = 0 if every is None else len(range(0, steps, every))
    full = guided * (2 if recipe.guide_negative and prompts == 2 else 1)
    rows = steps * prompts + full
    kept = sum(served.layout.length * served.heads * served.dim for served in layers)
    cache = kept * (1 if recipe.cache == "int8" else dtype.itemsize)
    cache *= 0 if every is None or recipe.cache == "offload" else 1
    mixed = {
        name: (steps * prompts * getattr(windows, name) + full) / rows
        for name in ("exact", "visited", "ideal", "cost")
    }
    return replace(
        stock,
        rows=rows,
        method=repr(recipe),
        shares=Shares(**mixed),
        memory=stock.memory + cache + tokens_memory(layers, dtype, 1),
        note=f"windows {windows.exact:.1%}, and {full} of {rows} rows with full attention as guide"
        f" (their text attention takes {cache / 1e9:.1f} GB)",
    )


def _windows_phase(outline: Outline, job: VideoJob, windows: TimeWindows, device: str) -> Phase:
    """Stock attention over windows along time, instead of over all frames."""
    steps = job.steps
    whole = _phase(outline, job, "sample", steps, steps * _prompts(windows), device)
    latent_frames, *sides = latent_size(outline, job.size, job.frames)
    length = min(windows.length, latent_frames)
    count = sum(len(windows.starts(latent_frames, step)) for step in range(steps)) / steps
    share = length / latent_frames
    layers = served_layers(
        next(iter(outline.denoisers.values())), (length, *sides), text_of(outline)
    )
    # a row of a window costs the other work of its own length, attention of its length squared
    # unless each frame attends to itself alone
    attended = min(1.0, count * share * (share if whole.grid[0] == latent_frames else 1.0))
    return replace(
        whole,
        method=repr(windows),
        shares=Shares(attended, attended, attended, attended),
        memory=_memory(outline, job, tokens_memory(layers, dtype_on(device), 1), device),
        note=f"{count:.1f} windows of {length} latent frames per step, each with full attention; "
        f"overlaps make the rest of the denoiser {count * share:.2f} times as much",
        other_share=count * share,
    )  # fmt: skip


def text_of(outline: Outline) -> int:
    """Text tokens of a call, as the pipeline pads them."""
    family = family_of(outline)
    if family is not None and family.text:
        return family.text
    return binding_of(next(iter(outline.denoisers.values()))).text_length


def _memory(outline: Outline, job: VideoJob, tokens: float, device: str) -> float:
    """Bytes at the peak: attention, or three copies of the decoded video in fp32."""
    video = 3 * 3.0 * prod(job.size) * job.frames * 4
    return PROGRAM + weights_memory(outline, dtype_on(device)) + max(tokens, video)
