"""Predicts what a generation will compute, from the configuration of a pipeline alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from diffaccel.attach.forecast import device_facts, slower_reason
from diffaccel.bindings import binding_of
from diffaccel.methods import FullAttn, Method
from diffaccel.methods.inputs import Position
from diffaccel.pipelines.image.job import ImageJob
from diffaccel.pipelines.image.tiling import tiles
from diffaccel.pipelines.plan.memory import image_memory
from diffaccel.pipelines.plan.operations import (
    ServedLayer,
    autoencoder_flop,
    other_flop,
    served_layers,
)
from diffaccel.pipelines.plan.skeleton import Outline
from diffaccel.pipelines.windows import throughout


@dataclass(frozen=True, slots=True)
class Shares:
    """What a method leaves of the attention of some layers, as shares of dense attention.

    Args:
        exact: Query-key pairs that count; None where only a run tells.
        visited: Pairs that the kernels compute, masked ones included.
        ideal: Pairs that they would compute if their tiles fitted.
        cost: Time of the attention kernels.
    """

    exact: float | None = 1.0
    visited: float | None = 1.0
    ideal: float | None = 1.0
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of denoising steps at one size.

    Args:
        name: What happens.
        size: (width, height) in pixels.
        frames: Of a video; 1 for a picture.
        steps: Denoising steps.
        rows: Rows that the denoiser computes over all steps.
        dense_rows: Rows that dense attention at the same size would take, the yardstick.
        grid: (frames, height, width) of the visual tokens, the largest where levels differ.
        text: Text tokens that join them in self-attention.
        method: The attention, as its repr, or "stock".
        shares: What it leaves.
        attention_flop: Of dense self-attention, per row.
        other_flop: Of everything else that the denoiser multiplies, per row.
        autoencoder_flop: Of encoding and decoding at this size; None where it is not known.
        memory: Bytes at the peak, everything loaded included.
        note: What else is to be said.
        other_share: Part of `other_flop` that a row computes.
    """

    name: str
    size: tuple[int, int]
    frames: int
    steps: int
    rows: float
    dense_rows: float
    grid: tuple[int, int, int]
    text: int
    method: str
    shares: Shares
    attention_flop: float
    other_flop: float
    autoencoder_flop: float | None
    memory: float
    note: str = ""
    other_share: float = 1.0

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return prod(self.grid)

    @property
    def attention_time(self) -> float:
        """Time of attention in terms of dense attention."""
        return self.rows * self.shares.cost / self.dense_rows

    @property
    def time(self) -> float:
        """Time of the denoiser in terms of dense attention, by operations."""
        dense = self.dense_rows * (self.attention_flop + self.other_flop)
        other = self.other_flop * self.other_share
        return self.rows * (self.attention_flop * self.shares.cost + other) / dense


@dataclass(frozen=True, slots=True)
class Plan:
    """What a generation will compute.

    Args:
        phases: In order.
        parameters: Of everything that is loaded.
        notes: What the numbers do not tell.
    """

    phases: tuple[Phase, ...]
    parameters: int
    notes: tuple[str, ...] = ()


def plan_image(outline: Outline, job: ImageJob, *, device: str = "cpu") -> Plan:
    """Plans what `generate_image` will do with the same job.

    Args:
        outline: The pipeline.
        job: What to draw, and how.
        device: Where it will run.
    """
    first, *larger = job.stages
    if job.switches.direct and larger:
        phases = [_image_phase(outline, job, job.attention, device)]
    else:
        phases = [_image_phase(outline, first, None, device)]
        phases += [
            _image_phase(outline, stage, stage.attention, device, is_refined=True)
            for stage in larger
        ]
    notes = [f"{name} could not be read and is not counted" for name in outline.unread]
    if outline.class_name == "QwenImagePipeline":
        notes.append(
            f"the length of the text is that of the prompt, taken to be {job.preset.text}"
        )
    return Plan(tuple(phases), parameter_count(outline), tuple(notes))


def parameter_count(outline: Outline) -> int:
    """Parameters of everything that is loaded."""
    return sum(p.numel() for module in outline.modules.values() for p in module.parameters())


def dtype_on(device: str) -> torch.dtype:
    """The dtype in which weights are loaded by default."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def shares_of(
    method: Method | None,
    layers: tuple[ServedLayer, ...],
    model: nn.Module,
    outline: Outline,
    steps: range,
    device: str,
    always: bool = False,
) -> tuple[Shares, str]:
    """What a method leaves of the attention of a denoiser, its schedule followed.

    Of the `steps.stop` steps of the noise schedule those from `steps.start` run. With `always`,
    the method also runs where dense attention is expected to be faster.

    Returns:
        The shares, weighted by operations, and a remark on layers or steps that stay dense.
    """
    if method is None:
        return Shares(), ""
    binding = binding_of(model)
    resolved = method.resolved(binding.family(model, outline), len(layers), steps=steps.stop)
    # What follows the schedule does so linearly: its mean is what it is in the middle.
    middle = (steps.start + steps.stop - 1) / 2 / max(steps.stop, 1)
    resolved = resolved.scheduled(Position(progress=middle))
    scheduled = resolved
    while hasattr(scheduled, "method"):  # a wrapper leaves the schedule to what it wraps
        scheduled = scheduled.method
    total = sum(layer.dense_flop for layer in layers)
    sums: dict[str, Any] = dict.fromkeys(("exact", "visited", "ideal", "cost"), 0.0)
    reasons, is_known, dense_share = set(), True, 0.0
    for served in layers:
        weight = served.dense_flop / total
        query = torch.empty((), device=device, dtype=dtype_on(device)).expand(
            1, served.layout.length, served.heads, served.dim
        )
        reason = scheduled.shape_reason(served.layout)
        if not reason and not always:
            facts = device_facts(query.device)
            reason = slower_reason(resolved, served.layout, query.shape, query.dtype, facts)
        shares = Shares() if reason else _layer_shares(resolved, served, query)
        why_dense = [
            scheduled.schedule_reason(
                Position(
                    served.layer.index,
                    step - steps.start,
                    step / steps.stop,
                    (step + 1) / steps.stop,
                )
            )
            for step in steps
        ]
        dense = sum(map(bool, why_dense)) / max(len(steps), 1)
        dense_share += weight * (1.0 if reason else dense)
        reasons |= {reason, *why_dense} - {""}
        is_known &= shares.exact is not None
        for name in sums:
            sums[name] += weight * (dense + (1.0 - dense) * (getattr(shares, name) or 0.0))
    if not is_known:
        sums |= {"exact": None, "visited": None, "ideal": None}
    if isinstance(scheduled, FullAttn):  # dense attention was asked for
        return Shares(**sums), ""
    note = f"{dense_share:.0%} of it stays dense" if dense_share else ""
    return Shares(**sums), "; ".join([note, *sorted(reasons)]).strip("; ")


def _layer_shares(method: Method, served: ServedLayer, query: torch.Tensor) -> Shares:
    exact = method.expected_density(served.layout)
    found = method.visited(served.layout, query, served.layer.index)
    cost = method.expected_cost(served.layout, query.device.type)
    visited, ideal = (exact, exact) if found is None else found
    return Shares(exact, visited, ideal, 1.0 if cost is None else cost)


def _image_phase(
    outline: Outline,
    job: ImageJob,
    method: Method | None,
    device: str,
    *,
    is_refined: bool = False,
) -> Phase:
    preset, scale = job.preset, outline.vae_scale_factor_spatial
    latents = (job.size[1] // scale, job.size[0] // scale)
    model, *_ = outline.denoisers.values()
    text = preset.text or binding_of(model).text_length
    layers = served_layers(model, latents, text)
    largest = max((served.layout for served in layers), key=lambda layout: layout.length)
    schedule = job.switches.schedule if is_refined else job.native_steps
    steps = job.switches.executed_steps if is_refined else schedule
    if method is not None:
        method = throughout(method)
    shares, note = shares_of(
        method, layers, model, outline, range(schedule - steps, schedule), device,
        always=not job.is_for_speed,
    )  # fmt: skip
    rows = steps * (preset.refine_passes if is_refined else preset.passes)
    vae = outline.modules["vae"]
    pieces = Counter([job.size]) if method is None else tiles(*job.size)
    parts = ("encode", "decode") if is_refined else ("decode",)
    has_levels = "block_out_channels" in vae.config
    return Phase(
        name=f"{'refine to' if is_refined else 'sample'} {job.label}",
        size=job.size,
        frames=1,
        steps=steps,
        rows=rows,
        dense_rows=rows,
        grid=largest.grid,
        text=largest.length - largest.visual.length,
        method="stock" if method is None else repr(method),
        shares=shares,
        attention_flop=sum(served.dense_flop for served in layers),
        other_flop=other_flop(model, latents, text),
        autoencoder_flop=sum(autoencoder_flop(vae, pieces, part) for part in parts)
        if has_levels
        else None,
        memory=image_memory(outline, job, layers, dtype_on(device), is_refined),
        note=note,
    )
