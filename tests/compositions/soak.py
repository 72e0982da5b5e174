"""Uses the product for a given time in one process, and fails where anything grows.

    python -m tests.compositions.soak --minutes 10

One list of drawn compositions is run through again and again: long-lived pipelines of all
families change size, method, guidance and cache, some calls fail half-way, and some pipelines are
dropped with everything still attached. After each pass, and a collection of garbage, these must be
exactly what they were after the passes before: live tensors, objects known to the collector,
handles of attached layers, hooks on the models, open files and threads. The first `WARM_UP`
passes fill caches of bounded size and are not counted. Resident memory is read at the same
moments: its slope over the passes after the first fifth of the time, by least squares, may be at
most `MOST_GROWTH` MiB per minute, in runs of at least `LEAST_MINUTES`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import _lru_cache_wrapper
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil  # noqa: E402
import torch  # noqa: E402

from diffaccel.attach import seam  # noqa: E402
from tests.compositions import stock  # noqa: E402
from tests.compositions.draw import Composition  # noqa: E402
from tests.compositions.families import FAMILIES  # noqa: E402
from tests.compositions.judge import attach, guide, quiet, runnable  # noqa: E402
from tests.support import tiny_pipelines  # noqa: E402

WARM_UP = 3
"""Passes whose counts are not compared."""

MOST_GROWTH = 0.5
"""MiB of resident memory per minute."""

LEAST_MINUTES = 5
"""Shorter runs say nothing about memory: the allocator takes it in large pieces."""

MIB = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=44, help="compositions of one pass")
    options = parser.parse_args(arguments)
    with quiet():
        return soak(options.minutes, options.seeds)


def soak(least: float, seeds: int) -> int:
    """Prints a line for each pass; returns 1 where something grew."""
    compositions = [lasting(runnable(seed)[0]) for seed in range(seeds)]
    pipes = {c.family: tiny_pipelines.BUILDERS[c.family]() for c in compositions}
    schedulers = {family: tiny.pipe.scheduler for family, tiny in pipes.items()}
    started = time.perf_counter()
    minutes: list[float] = []
    memory: list[float] = []
    first: Counter[str] = Counter()
    while not minutes or minutes[-1] < least or len(minutes) < WARM_UP + 2:
        ran = sum(use(c, pipes[c.family], schedulers[c.family]) for c in compositions)
        found = counts(pipes)
        minutes.append((time.perf_counter() - started) / 60)
        memory.append(psutil.Process().memory_info().rss / MIB)
        if len(minutes) <= WARM_UP + 1:
            first = found
        facts = ", ".join(f"{found[name]} {name}" for name in NAMES)
        print(f"{minutes[-1]:6.2f} min: {memory[-1]:.1f} MiB, {ran} uses, {facts}", flush=True)
    problems = grown(first, found)
    if ran < len(compositions) / 2:
        problems.append(f"only {ran} of {len(compositions)} uses ran")
    rate = slope(minutes, memory)
    print(f"resident memory grows by {rate:.3f} MiB per minute, {MOST_GROWTH} are allowed")
    if rate > MOST_GROWTH and minutes[-1] >= LEAST_MINUTES:
        problems.append("resident memory grows")
    print("\n".join(problems) or f"nothing grew in {len(minutes)} passes")
    return 1 if problems else 0


def lasting(composition: Composition) -> Composition:
    """What of a composition can come and go on a pipeline that stays."""
    is_unet = FAMILIES[composition.family].schedulers == "unet"  # which cannot disable a cache
    cache = None if is_unet else composition.cache
    return replace(composition, adapter=None, dtype="fp32", cache=cache)


def use(composition: Composition, tiny: Any, scheduler: Any) -> bool:
    """Attaches, runs at two sizes, and removes; some runs fail, some pipelines are dropped.

    Returns whether all of it ran: some combinations are refused, or not for stock diffusers.

    Args:
        composition: What is run.
        tiny: The pipeline that stays.
        scheduler: With which it was built.
    """
    is_dropped = composition.seed % 5 == 4
    if is_dropped:
        tiny = stock.pipeline(composition)
    attached: dict[str, Any] = {}
    try:
        tiny.pipe.scheduler = stock.scheduler(composition, scheduler)
        tiny.arguments = stock.arguments(composition, tiny.arguments, torch.float32)
        stock.add_cache(composition, tiny)
        attach(composition, tiny, attached)
        guide(composition, tiny, attached)
        stock.run(composition, tiny)
        larger = replace(composition, rows=composition.rows + 1)
        tiny.arguments = stock.arguments(larger, tiny.arguments, torch.float32)
        if composition.seed % 3 == 0:
            fail(larger, tiny)
        stock.run(larger, tiny)
        for attachment in attached.values():
            str(attachment.report())
        return True
    except Exception:  # of any kind: what is left behind is what counts here  # noqa: BLE001
        return False
    finally:
        if not is_dropped:
            for attachment in attached.values():
                attachment.remove()
            for model in tiny.denoisers().values():
                if getattr(model, "is_cache_enabled", False):
                    model.disable_cache()


def fail(composition: Composition, tiny: Any) -> None:
    """Runs into an error in the middle of the denoiser."""
    model = next(iter(tiny.denoisers().values()))
    layer = model.get_submodule(FAMILIES[composition.family].layers[1][0])

    def stop(*_: Any) -> None:
        raise InterruptedError("on purpose")

    handle = layer.register_forward_hook(stop)
    try:
        stock.run(composition, tiny)
    except InterruptedError:
        pass
    finally:
        handle.remove()


def hooks(pipes: dict[str, Any]) -> int:
    """Hooks on all modules of the long-lived denoisers."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for tiny in pipes.values()
        for model in tiny.denoisers().values()
        for module in model.modules()
    )


NAMES: dict[str, Callable[[dict[str, Any]], int]] = {
    "tensors": lambda pipes: sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()),
    # without the counts themselves
    "objects": lambda pipes: sum(type(x) is not Counter for x in gc.get_objects()),
    "handles": lambda pipes: len(seam._LAYERS),
    "hooks": hooks,
    "files": lambda pipes: psutil.Process().num_fds(),
    "threads": lambda pipes: threading.active_count(),
}


def counts(pipes: dict[str, Any]) -> Counter[str]:
    """Counts what is alive, and every type of object by name."""
    forget_tables()
    while gc.collect():
        pass
    found = Counter({name: count(pipes) for name, count in NAMES.items()})
    types = Counter(type(x) for x in gc.get_objects() if type(x) is not Counter)
    for kind, number in types.items():
        found[f"type {kind.__qualname__}"] += number
    return found


def forget_tables() -> None:
    """Empties what diffusers itself keeps of dropped models: rotary tables of Qwen-Image."""
    for found in gc.get_objects():
        if isinstance(found, _lru_cache_wrapper) and found.__module__.startswith("diffusers."):
            found.cache_clear()


def grown(first: Counter[str], last: Counter[str]) -> list[str]:
    """Says what there is more of after the last pass than after the warm-up."""
    if all(first[name] == last[name] for name in NAMES):
        return []
    more = [name for name in last if last[name] > first[name]]
    return [f"{name}: {first[name]}, then {last[name]}" for name in more]


def slope(minutes: list[float], memory: list[float]) -> float:
    """Least-squares slope in MiB per minute, after the first fifth of the time and the warm-up."""
    kept = [
        (x, y)
        for number, (x, y) in enumerate(zip(minutes, memory, strict=True))
        if number >= WARM_UP and x >= minutes[-1] / 5
    ]
    middle = sum(x for x, _ in kept) / len(kept)
    spread = sum((x - middle) ** 2 for x, _ in kept)
    return sum((x - middle) * y for x, y in kept) / spread if spread else 0.0


if __name__ == "__main__":
    sys.exit(main())
