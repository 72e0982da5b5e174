"""Guidance of one denoiser: what happens before and after each of its calls."""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.attach import set_attn_processor
from diffaccel.bindings import AttentionLayer, Binding, ModelCall, binding_of
from diffaccel.block_perturbation import PermuteTokens, SkipLayers
from diffaccel.methods import FullAttn
from diffaccel.methods.head_perturbation import HeadPerturbation
from diffaccel.run import run_of
from diffaccel.schedule import StepClock
from diffaccel.shared_prefix import SharedPrefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

Perturbation = HeadPerturbation | SkipLayers | PermuteTokens
SHARED = frozenset({"image_rotary_emb", "img_ids", "txt_ids"})  # arguments without a batch axis


class Guide:
    """Guidance of one denoiser: hooks before and after its forward, and the state of a run.

    Args:
        pipe: The pipeline, which tells whether a batch holds the empty prompt too.
        model: The denoiser.
        perturbation: What is damaged.
        scale: w.
        window: Shares of the steps between which it acts.
        clock: Step position, shared by the denoisers of a pipeline.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        model: nn.Module,
        perturbation: Perturbation,
        scale: float,
        window: tuple[float, float],
        clock: StepClock,
    ) -> None:
        self.perturbation = perturbation
        self.scale = scale
        self._pipe, self._model = weakref.ref(pipe), weakref.ref(model)
        self._window, self._clock = window, clock
        self._binding: Binding = binding_of(model)
        self._layers: tuple[AttentionLayer, ...] = self._binding.layers(model)
        stages = self._binding.stages(model)
        length = _sound_stages(stages, self._layers[perturbation.touched[0]].name)
        self.rerun = 1.0 - length / len(stages)
        self._prefix = SharedPrefix(model, self._binding, length)
        self._inside = False
        self._call: ModelCall | None = None
        self._rows = slice(None)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._forget_run()

    def __deepcopy__(self, memo: dict) -> Guide:
        # A copied model belongs to no pipeline yet: the hooks that it took along do nothing.
        copied = object.__new__(Guide)
        copied._inside = True
        return copied

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._prefix.remove()

    def _forget_run(self) -> None:
        self.steps: set[int] = set()
        self.guided: set[int] = set()
        self.extra_forwards = 0.0
        self.seconds: float | None = 0.0
        self._known: tuple[int, Tensor, Tensor] | None = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._inside or self._pipe() is None:
            return
        self._prefix.forget()
        self._call = ModelCall.of(model, args, kwargs, {})
        if self._clock.tick(self._call.arguments.get("timestep")):
            for guide in self._pipe()._diffaccel_guidance._guides:
                guide._forget_run()
        self.steps.add(self._clock.step or 0)
        self._rows = self._prompt_rows(len(self._latents))
        if self._acts() and self._remembered() is None:
            self._prefix.start()

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self._inside or self._pipe() is None or not self._acts():
            return None
        self._prefix.stop()
        prediction = output[0]
        delta = self._remembered()
        if delta is None:
            delta = self.scale * (prediction[self._rows] - self._damaged(args, kwargs))
            self._known = (self._clock.step, self._latents[self._rows].clone(), delta)
            self._prefix.forget()
        repeats = len(prediction) // len(delta)
        delta = delta.repeat(repeats, *[1] * (delta.ndim - 1))
        return _with_prediction(output, prediction + delta)

    @property
    def _latents(self) -> Tensor:
        arguments = self._call.arguments
        return arguments["hidden_states" if "hidden_states" in arguments else "sample"]

    def _acts(self) -> bool:
        if self.scale == 0 or getattr(self.perturbation, "strength", 1.0) == 0:
            return False
        timesteps = getattr(self._pipe().scheduler, "timesteps", ())
        position = (self._clock.step or 0) / max(1, len(timesteps))
        return self._window[0] <= position < self._window[1]

    def _prompt_rows(self, count: int) -> slice:
        """Returns which rows belong to the prompt; an empty one takes the first half."""
        if not self._binding.batches_prompts:
            return slice(None)
        pipe = self._pipe()
        with_empty = getattr(pipe, "do_classifier_free_guidance", None)
        if with_empty is None:
            with_empty = pipe.guidance_scale > 1.0
        return slice(count // 2, count) if with_empty and count % 2 == 0 else slice(None)

    def _remembered(self) -> Tensor | None:
        """Returns the difference of this step, if a call on the same latents has computed it."""
        if self._known is None or self._known[0] != self._clock.step:
            return None
        _, latents, delta = self._known
        present = self._latents[-len(latents) :]
        same = present.shape == latents.shape and torch.equal(present, latents)
        return delta if same else None

    def _damaged(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Runs the damaged model on the rows of the prompt."""
        model, count = self._model(), len(self._latents)
        started = perf_counter()
        shares = self._prefix.complete
        with ExitStack() as stack:
            stack.enter_context(self._reentered())
            if hasattr(model, "cache_context"):
                stack.enter_context(model.cache_context("perturbed"))
            stack.enter_context(self._applied())
            if shares:
                stack.enter_context(self._prefix.replayed(model, self._rows))
            output = model(
                *_batch_rows(args, count, self._rows), **_batch_rows(kwargs, count, self._rows)
            )[0]
        self.guided.add(self._clock.step or 0)
        self.extra_forwards += self.rerun if shares else 1.0
        on_cpu = output.device.type == "cpu"
        self.seconds = self.seconds + perf_counter() - started if on_cpu else None
        return output

    @contextmanager
    def _reentered(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _applied(self) -> Any:
        if isinstance(self.perturbation, HeadPerturbation):
            return _heads_damaged(self._model(), self.perturbation)
        return self.perturbation.applied(
            self._model(), self._binding, self._layers, self._clock.step or 0
        )


@contextmanager
def _heads_damaged(model: nn.Module, perturbation: HeadPerturbation) -> Iterator[None]:
    """While active, heads of a denoiser are damaged, on top of the method that it has if any."""
    own = run_of(model)
    attachment = nullcontext() if own else set_attn_processor(model, FullAttn(), always=True)
    with attachment:
        run = run_of(model)
        run.perturbation = perturbation
        try:
            yield
        finally:
            run.perturbation = None


def _sound_stages(stages: tuple[str, ...], first_damaged: str) -> int:
    """Returns how many stages come before the one that holds a layer."""
    inside = [first_damaged.startswith(f"{stage}.") for stage in stages]
    return inside.index(True)


def _batch_rows(value: Any, count: int, rows: slice, name: str = "") -> Any:
    """Takes rows of every tensor of a call that has `count` rows, inside of containers too."""
    if rows == slice(None) or name in SHARED:
        return value
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {key: _batch_rows(part, count, rows, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_batch_rows(part, count, rows) for part in value)
    return value


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    (name, _), *rest = output.items()
    return type(output)(**{name: prediction, **dict(rest)})
