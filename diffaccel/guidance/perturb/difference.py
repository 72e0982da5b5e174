"""Guidance by the difference between the sound and the damaged model."""

from __future__ import annotations

from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.attach.caches import caches_of
from diffaccel.guidance.guide import (
    GuidanceState,
    Guide,
    on_batch,
    prediction_of,
    unconsumed,
    with_prediction,
)
from diffaccel.guidance.perturb.blocks import PermuteTokens, SkipLayers, splits_tokens
from diffaccel.guidance.perturb.damage import Damage, Perturbation
from diffaccel.guidance.perturb.heads import HeadPerturbation
from diffaccel.guidance.perturb.shared_prefix import SharedPrefix


class DifferenceGuide(Guide):
    """Adds w (c - p) to every prediction of a step; see `diffaccel.guidance.attachment`."""

    def __init__(
        self, state: GuidanceState, model: nn.Module, perturbation: Perturbation, scale: float
    ) -> None:
        self._damage = Damage(model, perturbation)  # first, as it refuses some processors
        super().__init__(state, model, perturbation, scale)
        stages = self._binding.stages(model)
        length = _sound_stages(stages, self._layers[perturbation.touched[0]].name)
        if self.is_compiled:
            length = 0  # a compiled graph hands out nothing from its middle
        self.rerun = 1.0 - length / len(stages) if stages else 1.0
        self._prefix = SharedPrefix(model, self._binding, length)

    @property
    def hooked(self) -> tuple[str, ...]:
        """Paths of the layers at whose attention it acts."""
        return self._damage.hooked

    def remove(self) -> None:
        """Takes the hooks off."""
        super().remove()
        self._prefix.remove()
        self._damage.remove()

    def why_not_compiled(self) -> str:
        """Graphs do not follow exchanged blocks; heads are damaged inside of the seam."""
        if isinstance(self.perturbation, HeadPerturbation):
            return ""
        return "it exchanges whole blocks"

    def why_not_parallel(self, model: nn.Module) -> str:
        """Ranks hold a part of a sequence each, which the first block hands out in some models."""
        if isinstance(self.perturbation, PermuteTokens):
            return "it shuffles whole sequences, of which each rank has a part"
        if isinstance(self.perturbation, SkipLayers):
            for index in self.perturbation.touched:
                name = self._layers[index].block
                if splits_tokens(model.get_submodule(name), self._binding):
                    return f"it leaves {name} out, which splits or joins the tokens of the ranks"
        return ""

    def forget_run(self) -> None:
        """Begins a new run."""
        self._known: tuple[int, Tensor, Tensor] | None = None
        self._delta: Tensor | None = None

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Records what the damaged forward will have in common with this one."""
        if self.is_compiled:
            self._prefix.remove()
        self._prefix.forget()
        self._delta = self._remembered()
        if self._delta is None:
            self._again = unconsumed(args), unconsumed(kwargs)
            if not caches_of(model):  # what they return in place of a block is no output of it
                self._prefix.start()

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Adds the difference, computed at the first call of a step."""
        self._prefix.stop()
        if output is None:
            return None
        prediction, delta = prediction_of(output), self._delta
        if delta is None:
            rows = self.prompt_rows(len(self.latents))
            delta = self.scale * (prediction[rows] - self._damaged(*self._again, rows))
            self._known = (self._state.step, self.latents[rows].clone(), delta)
            self._prefix.forget()
            del self._again
        repeats = len(prediction) // len(delta)
        delta = delta.repeat(repeats, *[1] * (delta.ndim - 1))
        return with_prediction(output, prediction + delta)

    def _remembered(self) -> Tensor | None:
        """Returns the difference of this step, if a call on the same latents has computed it."""
        if self._known is None or self._known[0] != self._state.step:
            return None
        _, latents, delta = self._known
        present = self.latents[-len(latents) :]
        same = present.shape == latents.shape and torch.equal(present, latents)
        return delta if same else None

    def _damaged(self, args: tuple, kwargs: dict[str, Any], rows: slice) -> Tensor:
        """Runs the damaged model on the rows of the prompt."""
        model, count = self._model(), len(self.latents)
        started = perf_counter()
        shares = self._prefix.complete
        with ExitStack() as stack:
            stack.enter_context(self.calling_again())
            stack.enter_context(self._damage.active(model, self._state.step))
            if shares:
                stack.enter_context(self._prefix.replayed(model, rows, count))
            if kwargs.get("kv_cache_mode") == "extract" and kwargs.get("kv_cache") is not None:
                # The keys of the sound model are kept; FLUX.2 makes a store for each call.
                kwargs = {**kwargs, "kv_cache": None, "kv_cache_mode": None}
            if rows != slice(None):
                args, kwargs = (on_batch(x, count, lambda t: t[rows]) for x in (args, kwargs))
            output = prediction_of(model(*args, **kwargs))
        on_cpu = output.device.type == "cpu"
        self._state.count(
            self.rerun if shares else 1.0, perf_counter() - started if on_cpu else None
        )
        return output


def _sound_stages(stages: tuple[str, ...], first_damaged: str) -> int:
    """Returns how many stages come before the one that holds a layer, 0 where there are none."""
    inside = [first_damaged.startswith(f"{stage}.") for stage in stages]
    return inside.index(True) if stages else 0
