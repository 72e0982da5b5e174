"""Guidance of one denoiser: hooks around each of its calls, and the state of a run."""

from __future__ import annotations

import weakref
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.attach.state import run_of
from diffaccel.attach.step_clock import StepClock
from diffaccel.bindings import AttentionLayer, Binding, ModelCall, binding_of
from diffaccel.methods import FullAttn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffusers import DiffusionPipeline

    from diffaccel.attach.state import Run

SHARED = frozenset({"image_rotary_emb", "img_ids", "txt_ids"})  # arguments without a batch axis


class Guide:
    """What kinds of guidance have in common. A subclass says what happens around a call.

    Args:
        pipe: The pipeline, which tells whether a batch holds the empty prompt too.
        model: The denoiser.
        perturbation: What is done.
        scale: w.
        window: Shares of the steps between which it acts.
        clock: Step position, shared by the denoisers of a pipeline.

    Attributes:
        steps: Denoising steps seen in the latest run.
        guided: Those that were guided.
        extra_forwards: Additional forwards of the latest run, see `GuidanceReport`.
        seconds: Time that they took, None on devices that run ahead.
        rerun: Share of the model's stages that an additional forward runs.
    """

    rerun = 1.0

    def __init__(
        self,
        pipe: DiffusionPipeline,
        model: nn.Module,
        perturbation: Any,
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
        self._inside = False
        self._call: ModelCall | None = None
        self._handles = [
            model.register_forward_pre_hook(self._enter_call, with_kwargs=True),
            model.register_forward_hook(self._leave_call, with_kwargs=True, always_call=True),
        ]
        self.forget_run()

    def __deepcopy__(self, memo: dict) -> Guide:
        # A copied model belongs to no pipeline yet: the hooks that it took along do nothing.
        copied = object.__new__(type(self))
        copied._inside = True
        return copied

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forget_run(self) -> None:
        """Begins a new run."""
        self.steps: set[int] = set()
        self.guided: set[int] = set()
        self.extra_forwards = 0.0
        self.seconds: float | None = 0.0

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Prepares a guided call; may return other arguments for it."""

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Ends a guided call; may return another output. None came where the call has failed."""

    @property
    def step(self) -> int:
        """Index of the current denoising step."""
        return self._clock.step or 0

    @property
    def latents(self) -> Tensor:
        """What the model is called with."""
        arguments = self._call.arguments
        return arguments["hidden_states" if "hidden_states" in arguments else "sample"]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the current call by name."""
        return {name: x for name, x in self._call.arguments.items() if name != "self"}

    @contextmanager
    def calling_again(self) -> Iterator[None]:
        """While active, calls of the model are the guide's own."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def acts(self) -> bool:
        """Whether the current call is guided."""
        if self.scale == 0 or getattr(self.perturbation, "strength", 1.0) == 0:
            return False
        timesteps = getattr(self._pipe().scheduler, "timesteps", ())
        position = self.step / max(1, len(timesteps))
        return self._window[0] <= position < self._window[1]

    def prompt_rows(self, count: int) -> slice:
        """Returns which rows belong to the prompt; an empty one takes the first half."""
        if not self._binding.batches_prompts:
            return slice(None)
        pipe = self._pipe()
        with_empty = getattr(pipe, "do_classifier_free_guidance", None)
        if with_empty is None:
            with_empty = pipe.guidance_scale > 1.0
        return slice(count // 2, count) if with_empty and count % 2 == 0 else slice(None)

    def _enter_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._inside or self._pipe() is None:
            return None
        self._call = ModelCall.of(model, args, kwargs, {})
        if self._clock.tick(self._call.arguments.get("timestep")):
            for guide in self._pipe()._diffaccel_guidance.guides:
                guide.forget_run()
        self.steps.add(self.step)
        return self.before(model, args, kwargs) if self.acts() else None

    def _leave_call(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._inside or self._pipe() is None or not self.acts():
            return None
        return self.after(model, args, kwargs, output)


@contextmanager
def perturbing(model: nn.Module, perturbation: Any) -> Iterator[Run]:
    """While active, attention outputs of a denoiser go through `perturbation.perturb`.

    They are those of the method that the denoiser has, or of dense attention.

    Args:
        model: The denoiser.
        perturbation: Has `touched`, the layers that it changes, and `perturb`.
    """
    has_own = run_of(model) is not None
    with nullcontext() if has_own else set_attn_processor(model, FullAttn(), always=True):
        run = run_of(model)
        run.perturbation = perturbation
        try:
            yield run
        finally:
            run.perturbation = None


def on_batch(value: Any, count: int, change: Callable[[Tensor], Tensor], name: str = "") -> Any:
    """Changes every tensor of a call that has `count` rows, inside of containers too."""
    if name in SHARED:
        return value
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {key: on_batch(part, count, change, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_batch(part, count, change) for part in value)
    return value


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """Returns a model output, tuple or object, with another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    (name, _), *rest = output.items()
    return type(output)(**{name: prediction, **dict(rest)})
