"""Guidance of one denoiser: hooks around each of its calls, and the state of a run."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffaccel.attach.attachment import DENOISERS, check_hooked
from diffaccel.attach.caches import caches_bypassed
from diffaccel.attach.running import Caller, running_pipeline
from diffaccel.attach.state import context_of
from diffaccel.attach.step_clock import StepClock
from diffaccel.bindings import ModelCall, binding_of
from diffaccel.errors import ModelError
from diffaccel.guidance.prompt_rows import PromptRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffusers import DiffusionPipeline

SHARED = frozenset({"image_rotary_emb", "img_ids", "txt_ids"})  # arguments without a batch axis
# Arguments whose second axis is the batch.
SECOND = frozenset({"encoder_hidden_states_llama3", "full_cache", "compressed_cache"})
LISTS = frozenset({"img_shapes", "shape_list"})  # arguments with one entry per sample


class GuidanceState:
    """Where a guided pipeline is in a run, and what its guides did; shared by them.

    Args:
        pipe: The pipeline.
        window: Shares of the steps between which guidance acts.

    Attributes:
        run: Number of the run, by which guides tell that a new one has begun.
        steps: Denoising steps seen in the latest run.
        guided: Those that were guided.
        forwards: Additional forwards of the latest run, whole or not.
        extra_forwards: The same, parts of one counted by their share, see `GuidanceReport`.
        seconds: Time that they took, None on devices that run ahead.
    """

    seconds: float | None

    def __init__(self, pipe: DiffusionPipeline, window: tuple[float, float]) -> None:
        self._owner: Callable[[], Any] = weakref.ref(pipe)
        self._running: Callable[[], Any] = _nothing
        self.window = window
        self.clock = StepClock(pipe)
        self.run = 0
        self._forget_run()

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to the pipeline that runs it.
        return {**vars(self), "_owner": _nothing, "_running": _nothing}

    def pipe(self) -> Any:
        """Returns the pipeline that runs, or else the one that was guided; None without."""
        return self._running() or self._owner()

    @property
    def step(self) -> int:
        """Index of the current denoising step."""
        return self.clock.step or 0

    def begin_call(self, model: nn.Module, timestep: Tensor | float | None) -> None:
        """Moves to the step of a model call."""
        pipe = running_pipeline(model)
        self._running = _nothing if pipe is None else weakref.ref(pipe)
        if self.clock.tick(timestep, pipe):
            self.run += 1
            self._forget_run()
        self.steps.add(self.step)

    def is_inside(self) -> bool:
        """Whether the current step lies in the window, in shares of the steps that run."""
        planned = self.clock.planned
        position = self.step / planned if planned else self.clock.progress or 0.0
        return self.window[0] <= position < self.window[1]

    def count(self, share: float, seconds: float | None) -> None:
        """Notes that the current step was guided by a share of a forward, and what it cost."""
        self.guided.add(self.step)
        self.forwards += 1
        self.extra_forwards += share
        known = self.seconds
        self.seconds = None if seconds is None or known is None else known + seconds

    def _forget_run(self) -> None:
        self.steps: set[int] = set()
        self.guided: set[int] = set()
        self.forwards = 0
        self.extra_forwards = 0.0
        self.seconds = 0.0


def _nothing() -> None:
    return None


class Guide:
    """What kinds of guidance have in common. A subclass says what happens around a call.

    Args:
        state: Of the pipeline's guidance.
        model: The denoiser.
        perturbation: What is done.
        scale: w.

    Attributes:
        rerun: Share of the model's stages that an additional forward runs.
        is_compiled: Whether the denoiser, or a part of it, runs as a compiled graph.
    """

    rerun = 1.0

    def __init__(
        self, state: GuidanceState, model: nn.Module, perturbation: Any, scale: float
    ) -> None:
        self._binding = binding_of(model)
        self.perturbation = perturbation
        self.scale = scale
        self._state = state
        self._model: Callable[[], Any] = weakref.ref(model)
        self._rows = PromptRows()
        self._layers = self._binding.layers(model)
        self._caller = Caller()
        self._inside = False
        self._predicts = True
        self._run = state.run
        self._call: ModelCall | Any = None
        self.is_compiled = self._finds_compiled()
        self._refuse_compiled()
        self._handles = [
            # First of all, so that layouts are read from the arguments that the model will get.
            model.register_forward_pre_hook(self._enter_call, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave_call, with_kwargs=True, always_call=True),
        ]
        self.forget_run()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": _nothing, "_call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget_run()

    def __deepcopy__(self, memo: dict) -> Guide:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = memo.get(id(self._model()))
        if model is not None:
            copied._model = weakref.ref(model)
        return copied

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forget_run(self) -> None:
        """Begins a new run."""

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Prepares a guided call; may return other arguments for it."""

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Ends a guided call; may return another output. None came where the call has failed."""

    def why_not_compiled(self) -> str:
        """Returns why a compiled denoiser cannot be guided so, "" where it can."""
        return ""

    def why_not_parallel(self, model: nn.Module) -> str:
        """Returns why a denoiser whose tokens ranks share cannot be guided so, "" where it can."""
        return ""

    @property
    def model(self) -> Any:
        """The denoiser, None where it is gone."""
        return self._model()

    @property
    def hooked(self) -> tuple[str, ...]:
        """Paths of the layers at whose attention it acts."""
        return ()

    @property
    def latents(self) -> Tensor:
        """What the model is called with."""
        return self._call.arguments[self._binding.latents]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the current call by name."""
        return {name: x for name, x in self._call.arguments.items() if name != "self"}

    @contextmanager
    def calling_again(self) -> Iterator[None]:
        """While active, calls of the model are the guide's own, which no cache knows of."""
        self._inside = True
        try:
            with caches_bypassed(self._model()):
                yield
        finally:
            self._inside = False

    def acts(self) -> bool:
        """Whether the current call is guided."""
        return self._predicts and self.changes_something() and self._state.is_inside()

    def changes_something(self) -> bool:
        """Whether guided calls differ from others."""
        return self.scale != 0 and getattr(self.perturbation, "strength", 1.0) != 0

    def prompt_rows(self, count: int) -> slice:
        """Returns which rows belong to the prompt."""
        if not self._binding.batches_prompts:
            return slice(None)
        return self._rows.of(self._state.pipe(), count)

    def _finds_compiled(self) -> bool:
        model, pipe = self._model(), self._state.pipe()
        wrapped = [getattr(getattr(pipe, name, None), "_orig_mod", None) for name in DENOISERS]
        if any(inner is model for inner in wrapped):
            return True
        return any(part._compiled_call_impl is not None for part in model.modules())

    def _refuse_compiled(self) -> None:
        reason = self.why_not_compiled()
        if reason and self.is_compiled:
            raise ModelError(
                f"{type(self.perturbation).__name__} cannot guide a compiled denoiser, since "
                f"{reason}; guide before torch.compile, or use HeadPerturbation"
            )

    def _refuse_parallel(self, model: nn.Module) -> None:
        reason = "" if context_of(model) is None else self.why_not_parallel(model)
        if reason:
            raise ModelError(
                f"{type(self.perturbation).__name__} cannot guide a denoiser under context "
                f"parallelism, since {reason}; use HeadPerturbation, or do without "
                "enable_parallelism"
            )

    @torch.compiler.disable
    def _enter_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._caller.enter(model)
        if self._inside:
            return None
        self._model = weakref.ref(model)
        self._call = ModelCall.of(model, args, kwargs, {})
        self._predicts = self._binding.predicts(self._call)
        if not self._predicts:
            return None
        self._state.begin_call(model, self._binding.timestep(self._call))
        if self._run != self._state.run:
            self._run = self._state.run
            self._rows.forget_run()
            self.is_compiled = self._finds_compiled()
            self.forget_run()
        if self.changes_something():
            check_hooked(model, self.hooked)
        if not self.acts():
            return None
        self._refuse_compiled()
        self._refuse_parallel(model)
        return self.before(model, args, kwargs)

    @torch.compiler.disable
    def _leave_call(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self._caller.leave() or self._inside or not self.acts():
            return None
        return self.after(model, args, kwargs, output)


def on_batch(value: Any, count: int, change: Callable[[Tensor], Tensor], name: str = "") -> Any:
    """Changes every tensor of a call that has `count` rows, inside of containers too."""
    if name in SHARED or str(name).startswith("indices_"):
        return value
    if name in LISTS and isinstance(value, list) and len(value) == count:
        return [value[row] for row in change(torch.arange(count)).tolist()]
    if name in SECOND:
        return on_batch(value.transpose(0, 1), count, change).transpose(0, 1)
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {key: on_batch(part, count, change, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_batch(part, count, change) for part in value)
    return value


def unconsumed(value: Any) -> Any:
    """Returns arguments in lists and dictionaries of their own: models pop some off theirs."""
    if isinstance(value, dict):
        return {name: unconsumed(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(unconsumed, value))
    return value


def prediction_of(output: Any) -> Tensor:
    """Returns the prediction of a model output: a tuple, an object, or the tensor itself."""
    return output if isinstance(output, Tensor) else output[0]


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """Returns a model output, tuple, object or tensor, with another prediction."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    (name, _), *rest = output.items()
    return type(output)(**{name: prediction, **dict(rest)})


def guides_of(model: nn.Module) -> list[Guide]:
    """Returns the guides of a denoiser, found at its forward pre-hooks."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, Guide)]
