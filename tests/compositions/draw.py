"""What is drawn: one use of the product on one tiny pipeline, all of it told by a seed.

Where stock diffusers cannot run a draw, the next one of the same seed takes its place: so what a
seed stands for depends on which optional packages are installed (peft for LoRA, scipy and torchsde
for some schedulers).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import diffusers

from diffaccel import (
    AgentAttn,
    FullAttn,
    HeadPerturbation,
    HierarchicalWindowAttn,
    JitteredAttn,
    NeighborhoodAttn,
    NormalizedAttention,
    PermuteTokens,
    ProportionalAttn,
    RectifiedSpaAttn,
    SkipLayers,
    SlidingWindowAttn,
    SparseAttn,
    TokenMergingAttn,
)
from tests.compositions.families import FAMILIES

CACHES = (
    *("first_block_cache", "pyramid_attention_broadcast", "taylorseer_cache", "mag_cache"),
    *("faster_cache", "sea_cache"),
)
ADAPTERS = (
    *("lora", "fused_qkv", "ip_adapter", "attention_slicing", "group_offload"),
    "layerwise_casting",
)
FLOW_SCHEDULERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    *(
        (name, {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
        for name in (
            "UniPCMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DEISMultistepScheduler",
            "SASolverScheduler",
        )
    ),
)
VIDEO_SCHEDULERS = (("CogVideoXDDIMScheduler", {}), ("CogVideoXDPMScheduler", {}))
UNET_SCHEDULERS = tuple(
    (name, options)
    for name in sorted(diffusers.schedulers.scheduling_utils.KarrasDiffusionSchedulers.__members__)
    for options in ({}, {"use_karras_sigmas": True}, {"skip_prk_steps": True})
    if not options or next(iter(options)) in getattr(diffusers, name).__init__.__code__.co_varnames
)


@dataclass(frozen=True)
class Guidance:
    """Arguments of `set_guidance`.

    Args:
        perturbation: What is damaged; of normalised attention, with no prompt yet.
        scale: w.
        start: As of `set_guidance`.
        stop: As of `set_guidance`.
        own_prompt: Whether normalised attention steers away from the prompt itself.
    """

    perturbation: Any
    scale: float
    start: float
    stop: float
    own_prompt: bool = False


@dataclass(frozen=True)
class Composition:
    """One drawn use; the fields are what `tests/compositions` says that it draws.

    Args:
        rows: Height in units of the family, as `columns`.
        text: Tokens of the prompt.
        negative_text: Tokens of the negative prompt.
        order: In which "adapter", "cache", "method" and "guidance" come to the pipeline.
        dtype: "fp32", "fp64", "bf16", or "autocast" (to bf16).
    """

    seed: int
    draw: int
    family: str
    method: Any
    always: bool
    guidance: Guidance | None
    has_cfg: bool
    cache: str | None
    adapter: str | None
    dtype: str
    batch: int
    per_prompt: int
    scheduler: tuple[str, dict[str, Any]] | None
    rows: int
    columns: int
    frames: int
    text: int
    negative_text: int
    steps: int
    order: tuple[str, ...]


def drawn(seed: int, draw: int = 0) -> Composition:
    """Draws a composition; `draw` counts those before it that stock diffusers cannot run."""
    random = Random(f"{seed} {draw}")
    # Every family in turn, so that few seeds meet all.
    family = (*FAMILIES,)[seed % len(FAMILIES)]
    facts = FAMILIES[family]
    cache = random.choice((None, None, *CACHES))
    steps = random.randint(4, 5) if cache else random.randint(2, 4)
    method = _method(random, facts) if random.random() < 0.85 else None
    guidance = _guidance(random, facts) if random.random() < 0.5 or method is None else None
    has_cfg = random.random() < 0.5 and not (guidance and guidance.own_prompt)
    adapters = [None, None, None, *ADAPTERS]
    order = ["adapter", "cache", "method", "guidance"]
    random.shuffle(order)
    low, high = facts.sizes
    text = random.randint(1, 20)
    return Composition(
        seed=seed,
        draw=draw,
        family=family,
        method=method,
        always=random.random() < 0.5,
        guidance=guidance,
        has_cfg=has_cfg,
        cache=cache,
        adapter=random.choice(adapters),
        dtype=random.choice(("fp32", "fp32", "fp32", "fp64", "bf16", "autocast")),
        batch=random.choice((1, 1, 2)),
        per_prompt=random.choice((1, 1, 2)),
        scheduler=_scheduler(random, facts),
        rows=random.randint(low, high),
        columns=random.randint(low, high),
        frames=random.randint(1, 4),
        text=text,
        negative_text=random.randint(1, 20) if facts.calls_apart else text,
        steps=steps,
        order=tuple(order),
    )


def _scheduler(random: Random, facts: Any) -> tuple[str, dict[str, Any]] | None:
    choices: Any = {
        "flow": FLOW_SCHEDULERS,
        "cogvideox": VIDEO_SCHEDULERS,
        "unet": UNET_SCHEDULERS,
    }
    return random.choice((None, None, *choices[facts.schedulers]))


def _method(random: Random, facts: Any) -> Any:
    schedule = {
        "dense_steps": random.choice((0, 0, 0, 1)),
        "dense_layers": random.choice((0, 0, 1, (1,))),
    }
    blocks = {
        "block": random.choice((16, 32)),
        "order": random.choice(("hilbert", "brick", "raster")),
        "neighbors": random.random() < 0.3,
        "p_remain": random.choice((0.0, 0.3)),
        "first_frame": random.random() < 0.3,
        **schedule,
    }
    windows = NeighborhoodAttn(random.choice((2, 3)), stride=2, **schedule)
    makers = (
        lambda: FullAttn(),
        lambda: SparseAttn(random.choice((0.2, 0.5, 1.0)), **blocks),
        lambda: RectifiedSpaAttn(
            random.choice((0.3, 0.6, 0.8)), gapr=random.random() < 0.5, **blocks
        ),
        lambda: RectifiedSpaAttn(0.6, correction="centroids", **blocks),
        lambda: NeighborhoodAttn(
            random.choice((2, 3, (1, 2, 3), (2, 3))),
            dilation=random.choice((1, 2)),
            is_causal=random.random() < 0.3,
            **schedule,
        ),
        lambda: SlidingWindowAttn(
            random.choice((None, 3, (2, 4))),
            variant=random.choice(("inward", "truncated", "shifted", "tile", "block")),
            tile=2,
            token_growth=random.choice((1.0, 2.0)),
            **schedule,
        ),
        lambda: AgentAttn(
            random.choice((2, 3)),
            agents=random.choice(("pool", "middle", "match")),
            stop=random.choice((0.5, 1.0)),
            scale_power=random.choice((0.3, 1.0)),
            shortcut=random.choice((0.0, 0.075)),
            late=random.choice((FullAttn(), TokenMergingAttn(0.3, least_tokens=0, **schedule))),
            least_tokens=0,
            **schedule,
        ),
        lambda: TokenMergingAttn(
            random.choice((0.2, 0.5, 0.75)),
            cell=random.choice((2, (1, 2), (1, 2, 2))),
            least_tokens=0,
            **schedule,
        ),
        lambda: ProportionalAttn(
            random.choice((FullAttn(), SparseAttn(0.5, **blocks), windows)),
            random.choice((None, 17)),
        ),
        lambda: JitteredAttn(windows, seed=random.randint(0, 3)),
        lambda: HierarchicalWindowAttn(3, 2, **schedule),
    )
    return random.choice(makers)()


def _guidance(random: Random, facts: Any) -> Guidance:
    layers = tuple(sorted(random.sample(range(facts.least_layers), random.choice((1, 1, 2)))))
    strength = random.choice((0.5, 1.0, 1.0))
    start, stop = random.choice(((0.0, 1.0), (0.0, 1.0), (0.0, 0.5), (0.5, 1.0)))
    if random.random() < 0.3:
        perturbation = NormalizedAttention(limit=1e6, blend=random.choice((0.25, 1.0)))
        own_prompt = random.random() < 0.5
        return Guidance(perturbation, 4.0 if own_prompt else 1e-7, start, stop, own_prompt)
    makers = (
        lambda: HeadPerturbation(heads=((layers[0], random.randint(0, 1)),), strength=strength),
        lambda: HeadPerturbation(
            layers=layers,
            scope=random.choice(("sequence", "image", "image_mass")),
            strength=strength,
        ),
        lambda: HeadPerturbation(layers=layers, target="uniform", strength=strength),
        lambda: HeadPerturbation(
            layers=layers, target="blur", sigma=random.choice((float("inf"), 1.0, 2.0))
        ),
        lambda: SkipLayers(layers),
        lambda: PermuteTokens(layers, seed=random.randint(0, 3)),
    )
    return Guidance(random.choice(makers)(), random.choice((1e-7, 0.5, 2.0, 3.0)), start, stop)
