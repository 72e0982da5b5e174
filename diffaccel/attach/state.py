"""Run state of one attached denoiser: where it is in a run, and what its layers did."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from diffaccel.attach.forecast import why_dense
from diffaccel.attach.report import DenoiserReport, LayerLog, LayerReport, StepLog
from diffaccel.bindings import AttentionLayer, Binding, LayoutUnknown, ModelCall
from diffaccel.layout import TokenLayout

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from diffaccel.attach.step_clock import StepClock
    from diffaccel.guidance.perturb.heads import HeadPerturbation
    from diffaccel.methods.base import Method, Work


class Forecast(NamedTuple):
    """What is expected of a layer.

    Args:
        why_dense: Why dense attention would be faster, "" where it would not.
        work: What the kernel computes, where that is not what the density says.
    """

    why_dense: str
    work: Work | None


class Run:
    """The mutable state of one attachment to one denoiser.

    `begin_call` is the denoiser's forward pre-hook; the layers' processors read the layout and
    the step here and record what they did. Holds no module, so that a deep copy of the model
    gets a complete state of its own.

    Args:
        method: What to compute, its schedule filled in.
        binding: How the model's attention reaches the method.
        layers: The layers that the method serves.
        clock: Step position.
        family: The model family, for the report.
        always: Whether the method runs even where dense attention is expected to be faster.
    """

    def __init__(
        self,
        method: Method,
        binding: Binding,
        layers: tuple[AttentionLayer, ...],
        clock: StepClock,
        family: str,
        always: bool = False,
    ) -> None:
        self.method = method
        self.binding = binding
        self.layers = layers
        self.clock = clock
        self.family = family
        self.always = always
        self.perturbation: HeadPerturbation | None = None
        self.handle: RemovableHandle | None = None
        self._readings: dict[int, tuple[Tensor, Any]] = {}
        self._warned: set[str] = set()
        self._forget_calls()
        self.reset()

    def reset(self) -> None:
        """Forgets the latest run; the next model call begins a new one."""
        self.clock.reset()
        self._forget_run()

    @torch.compiler.disable
    def begin_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads step and layouts of one model call; runs before the model does."""
        self._forget_calls()
        call = ModelCall.of(model, args, kwargs, self._readings)
        if self.clock.tick(call.arguments.get("timestep")):
            self._forget_run()
        for layer in self.layers:
            if layer.stream not in self._layouts:
                self._layouts[layer.stream] = self._read_layout(model, call, layer)

    def layout(self, layer: AttentionLayer) -> TokenLayout | None:
        """Returns the tokens of a layer in the current model call, None where unknown."""
        found = self._layouts.get(layer.stream)
        return found if isinstance(found, TokenLayout) else None

    def why_no_layout(self, layer: AttentionLayer) -> str:
        """Returns why the current model call does not tell the tokens of a layer."""
        found = self._layouts.get(layer.stream)
        return found if isinstance(found, str) else "the layer ran outside its model's forward"

    def scheduled_dense(self, layer: AttentionLayer) -> str:
        """Returns why the method's schedule makes this call dense, "" where it does not."""
        step, progress = self.clock.step, self.clock.progress
        if not self.method.runs_dense(layer=layer.index, step=step, progress=progress):
            return ""
        if self.method.runs_dense(progress=progress):
            return f"outside start={self.method.start} to stop={self.method.stop}"
        knob = "dense_steps" if self.method.runs_dense(step=step) else "dense_layers"
        return f"{knob}={getattr(self.method, knob)}"

    def perturbs(self, layer: AttentionLayer) -> bool:
        """Whether heads of a layer are to be damaged in the current call."""
        return self.perturbation is not None and layer.index in self.perturbation.touched

    def forecast(self, layer: AttentionLayer, layout: TokenLayout, query: Tensor) -> Forecast:
        """Returns what is expected of a layer on query (B, N, H, D); once per run and shape."""
        key = (layer.name, layout, query.shape)
        if key not in self._forecasts:
            reason = "" if self.always else why_dense(self.method, layout, query)
            work = None if reason else self.method.work(layout, query, layer.index)
            self._forecasts[key] = Forecast(reason, work)
        return self._forecasts[key]

    def padding_mask(self, mask: Tensor, batch: int, length: int) -> Tensor | None:
        """Returns an attention mask as a key-padding mask, None where it is anything else.

        Converted once per mask and model call: all layers get the same one.

        Args:
            mask: As for SDPA: bool, or floats added to the logits.
            batch: B.
            length: N.

        Returns:
            (B, N) bool, True where a key may be attended.
        """
        known = self._masks.get(id(mask))
        if known is None:
            # Keeping the mask keeps its id from being given to another one.
            known = self._masks[id(mask)] = (mask, _as_padding_mask(mask, batch, length))
        return known[1]

    def record(
        self,
        layer: AttentionLayer,
        density: Tensor | float,
        reason: str = "",
        work: Work | None = None,
    ) -> None:
        """Records one call of a layer; `reason` says why it ran dense, "" if it did not."""
        self._logs[layer.name].record(self.layout(layer), density, reason, work)
        if self.clock.step is None:
            return
        step = self._steps.setdefault(self.clock.step, StepLog())
        if reason:
            step.dense_calls[reason] += 1
        else:
            step.sparse_calls += 1

    def warn_once(self, layer: AttentionLayer, reason: str) -> None:
        """Warns that a layer ran dense unexpectedly, once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{type(self.method).__name__} ran dense in {layer.name}: {reason}", stacklevel=2
            )

    def report(self, component: str, model: nn.Module, replaced: list[str]) -> DenoiserReport:
        """Returns what happened in the latest run; waits for the device.

        Args:
            component: Name of the denoiser within its pipeline, "" for a bare model.
            model: The denoiser.
            replaced: Layers whose processor somebody else has replaced since.
        """
        lost = dict.fromkeys(replaced, "its processor was replaced after the method was attached")
        return DenoiserReport(
            component=component,
            model=type(model).__name__,
            family=self.family,
            method=repr(self.method),
            layers=tuple(self._layer_report(layer) for layer in self.layers),
            skipped=self.binding.skipped(model) | lost,
            steps=len(self._steps),
            dense_steps={
                step: ", ".join(log.dense_calls)
                for step, log in sorted(self._steps.items())
                if not log.sparse_calls
            },
        )

    def _layer_report(self, layer: AttentionLayer) -> LayerReport:
        log = self._logs[layer.name]
        return LayerReport(
            name=layer.name,
            kind=layer.kind,
            layout=log.layout,
            sparse_calls=log.sparse_calls,
            dense_calls=dict(log.dense_calls),
            density=log.density(),
            pairs=log.pairs,
            work=log.work,
        )

    def _read_layout(
        self, model: nn.Module, call: ModelCall, layer: AttentionLayer
    ) -> TokenLayout | str:
        try:
            layout = self.binding.layout(model, call, layer)
            return replace(layout, native=self.binding.native(model, layer))
        except LayoutUnknown as unknown:
            return str(unknown)

    def _forget_calls(self) -> None:
        self._layouts: dict[tuple[str, int], TokenLayout | str] = {}
        self._masks: dict[int, tuple[Tensor, Tensor | None]] = {}

    def _forget_run(self) -> None:
        self._logs = {layer.name: LayerLog() for layer in self.layers}
        self._steps: dict[int, StepLog] = {}
        self._forecasts: dict[tuple[str, TokenLayout, torch.Size], Forecast] = {}


def run_of(model: nn.Module) -> Run | None:
    """Returns the run state of an attached denoiser, found at its forward pre-hook."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Run):
            return owner
    return None


def _as_padding_mask(mask: Tensor, batch: int, length: int) -> Tensor | None:
    *others, keys = mask.shape
    rows = others[0] if len(others) == 3 else 1
    per_query_or_head = others[1:] if len(others) == 3 else others
    if keys != length or rows not in (1, batch) or any(size != 1 for size in per_query_or_head):
        return None
    mask = mask.reshape(rows, length).expand(batch, length)
    if mask.dtype == torch.bool:
        return mask
    # Additive: padding is written as 0 and some large negative number; anything else is a bias.
    is_open = mask == 0
    is_padding_only = (is_open | (mask <= -1e4)).all()
    return is_open if is_padding_only else None
