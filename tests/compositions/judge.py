"""Runs a composition, compares it with its reference, and says how it went."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor

import diffaccel
from diffaccel import NormalizedAttention, set_attn_processor, set_guidance
from tests.compositions import stock
from tests.compositions.draw import Composition, drawn
from tests.compositions.reference import Reference

MOST_DRAWS = 30
"""Draws for one seed until stock diffusers can run one."""

TINY = 1e-7
"""Scale at which guidance is drawn to change nothing."""

MOST_EFFECT = 100
"""Change of the result as a share of it, in units of that scale."""

REFUSALS = (ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class Verdict:
    """How a composition went.

    Args:
        composition: What ran.
        outcome: "right", "refused" or "fault".
        words: The refusal, or what is wrong; "" where nothing is.
        error: Largest difference from the reference.
        limit: What rounding explains.
    """

    composition: Composition
    outcome: str
    words: str = ""
    error: float = 0.0
    limit: float = 0.0


class Fault(Exception):
    """Something that a composition does wrong."""


class Refused(Exception):
    """The product does not do a composition, and has said so."""


def judged(seed: int) -> Verdict:
    """Judges the first draw of a seed that stock diffusers can run."""
    with quiet():
        return _judged(*runnable(seed))


@contextmanager
def quiet() -> Iterator[None]:
    """While active, one thread computes, and nobody warns."""
    threads, verbosity = torch.get_num_threads(), diffusers.logging.get_verbosity()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        diffusers.logging.set_verbosity(verbosity)


def runnable(seed: int) -> tuple[Composition, Tensor]:
    """Returns the first draw of a seed that stock diffusers can run, and what stock makes."""
    for draw in range(MOST_DRAWS):
        composition = drawn(seed, draw)
        try:
            untouched = _stock(composition)
        except Exception:  # whatever stock diffusers raises  # noqa: BLE001
            continue
        if untouched.isfinite().all():
            return composition, untouched
    raise RuntimeError(f"stock diffusers runs no draw of seed {seed}")


def _stock(composition: Composition) -> Tensor:
    tiny = stock.pipeline(composition)
    stock.add_adapter(composition, tiny)
    stock.add_cache(composition, tiny)
    return stock.run(composition, tiny)


def _judged(composition: Composition, untouched: Tensor) -> Verdict:
    try:
        error, limit = _compared(composition, untouched)
    except Refused as refusal:
        return Verdict(composition, "refused", str(refusal))
    except Fault as fault:
        return Verdict(composition, "fault", str(fault))
    except Exception:  # of whatever kind: nothing but refusals is right  # noqa: BLE001
        return Verdict(composition, "fault", traceback.format_exc())
    if error > limit:
        words = f"off by {error:.2e}, where rounding explains {limit:.2e}"
        return Verdict(composition, "fault", words, error, limit)
    return Verdict(composition, "right", "", error, limit)


def _compared(composition: Composition, untouched: Tensor) -> tuple[float, float]:
    """Runs everything; returns the largest error and its limit."""
    tiny = stock.pipeline(composition)
    attached: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "adapter": lambda: stock.add_adapter(composition, tiny),
        "cache": lambda: stock.add_cache(composition, tiny),
        "method": lambda: attach(composition, tiny, attached),
        "guidance": lambda: guide(composition, tiny, attached),
    }
    for name in composition.order:
        steps[name]()
    models = tiny.denoisers().values()
    called: list[None] = []
    handles = [
        part.register_forward_hook(lambda *_: called.append(None))
        for model in models
        for part in model.children()
    ]
    try:
        first = stock.run(composition, tiny)
    except REFUSALS as error:
        # What was added after it can be refused no earlier than when the model is called.
        _refuse(error, f" (in the run, {len(called)} modules had run)" if called else "")
    finally:
        for handle in handles:
            handle.remove()
    if not first.isfinite().all():
        raise Fault("the result is not finite")
    if not torch.equal(first, stock.run(composition, tiny)):
        raise Fault("a second run differs from the first")
    served, seen = _reported(attached)
    reference = Reference(composition, served)
    expected = reference.run()
    for name, count in seen.items():
        if count != len(reference.seen_steps.get(name, ())):
            raise Fault(f"{name or 'guidance'} reports {count} steps, {reference.seen_steps} ran")
    for attachment in attached.values():
        attachment.remove()
    _check_removed(models)
    if not torch.equal(stock.run(composition, tiny), untouched):
        raise Fault("the pipeline differs from stock after everything was removed")
    error = (first.double() - expected.double()).abs().max().item()
    return error, 0.0 if error == 0 else _limit(composition, expected)


def _limit(composition: Composition, expected: Tensor) -> float:
    """Twice what rounding the attention of stock differently does to its result."""
    plain = replace(composition, method=None, guidance=None)
    noise = (Reference(plain).run().double() - Reference(plain, exact=True).run().double()).abs()
    narrow = composition.dtype in ("bf16", "autocast")
    epsilon = torch.finfo(torch.bfloat16 if narrow else expected.dtype).eps
    least = 8 * epsilon * expected.abs().max().item()
    guidance = composition.guidance
    if guidance and isinstance(guidance.perturbation, NormalizedAttention):
        # Of another prompt, a scale that is too small to count; its effect grows with it.
        return 2 * noise.max().item() + least + MOST_EFFECT * TINY * expected.abs().max().item()
    return (1 + 2 * (guidance.scale if guidance else 0)) * max(2 * noise.max().item(), least)


def attach(composition: Composition, tiny: Any, attached: dict[str, Any]) -> None:
    """Sets the method; raises `Refused` where the product refuses."""
    if composition.method is not None:
        try:
            attached["method"] = set_attn_processor(
                tiny.pipe, composition.method, always=composition.always
            )
        except REFUSALS as error:
            _refuse(error)


def guide(composition: Composition, tiny: Any, attached: dict[str, Any]) -> None:
    """Sets the guidance; raises `Refused` where the product refuses."""
    guidance = composition.guidance
    if guidance is None:
        return
    perturbation = guidance.perturbation
    if isinstance(perturbation, NormalizedAttention):
        perturbation = replace(perturbation, **_negative(composition, tiny.arguments))
    try:
        attached["guidance"] = set_guidance(
            tiny.pipe, perturbation, scale=guidance.scale, start=guidance.start, stop=guidance.stop
        )
    except REFUSALS as error:
        _refuse(error)


def _negative(composition: Composition, arguments: dict[str, Any]) -> dict[str, Any]:
    """A negative prompt: the prompt itself, or another one of another length."""
    prompt = arguments["prompt_embeds"][:1]
    names = ("prompt_embeds_mask", "prompt_attention_mask")
    mask = next((arguments[name][:1] for name in names if name in arguments), None)
    if not composition.guidance or composition.guidance.own_prompt:
        return {"negative_prompt": prompt, "negative_mask": mask}
    return {"negative_prompt": torch.cat([prompt, prompt[:, :3]], 1).flip(-1)}


def _refuse(error: Exception, late: str = "") -> None:
    """Raises `Refused` where the product has raised an error on purpose, else the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = "/diffaccel/" in frames[-1].filename
    if not ours or late:
        raise error
    raise Refused(f"{type(error).__name__}: {error}") from error


def _reported(attached: dict[str, Any]) -> tuple[dict[str, set[str]] | None, dict[str, int]]:
    """Returns the layers that the method served, and how many steps each attachment saw."""
    if "method" not in attached:
        return None, {}
    served, seen = {}, {}
    for denoiser in attached["method"].report().denoisers:
        seen[denoiser.component] = denoiser.steps
        lost = denoiser.skipped.keys()
        served[denoiser.component] = {layer.name for layer in denoiser.layers} - lost
        if denoiser.density is not None and not 0 < denoiser.density <= 1:
            raise Fault(f"the density is {denoiser.density}")
        if denoiser.steps and not denoiser.layers:
            raise Fault("no layer was served")
    return served, seen


def _check_removed(models: Any) -> None:
    for model in models:
        for hooks in (model._forward_hooks, model._forward_pre_hooks):
            if any(_is_ours(hook) for hook in hooks.values()):
                raise Fault("a hook stays on the model after everything was removed")
        for name, module in model.named_modules():
            processor: Any = getattr(module, "processor", None)
            if type(processor).__name__.startswith("Attached"):
                raise Fault(f"{name} keeps an attached processor after everything was removed")
            if any(_is_ours(hook) for hook in module._forward_hooks.values()):
                raise Fault(f"{name} keeps a hook after everything was removed")


def _is_ours(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith(diffaccel.__name__)
