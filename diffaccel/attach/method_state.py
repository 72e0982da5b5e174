"""State of a method on one denoiser: where it is in a run, and what its layers did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from diffaccel.attach.forecast import device_facts, slower_reason
from diffaccel.attach.obstacles import obstacle
from diffaccel.attach.report import DenoiserReport, LayerLog, LayerReport, StepLog
from diffaccel.methods.inputs import Position

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffaccel.attach.seam import AttentionCall
    from diffaccel.attach.step_clock import StepClock
    from diffaccel.bindings import AttentionLayer
    from diffaccel.layout import TokenLayout
    from diffaccel.methods.base import Method, Visited


class Plan(NamedTuple):
    """What holds for a layer and a shape throughout a run.

    Args:
        why_dense: Why the call runs dense, "" where it does not.
        visited: What the kernel computes, where that is not what the density says.
    """

    why_dense: str
    visited: Visited | None


class MethodState:
    """The mutable state of a method that is attached to one denoiser.

    Args:
        method: What to compute, its schedule filled in.
        layers: The layers that the method serves.
        clock: Step position.
        family: The model family, for the report.
        always: Whether the method runs even where dense attention is expected to be faster.
    """

    def __init__(
        self,
        method: Method,
        layers: tuple[AttentionLayer, ...],
        clock: StepClock,
        family: str,
        always: bool = False,
    ) -> None:
        self.method = method
        self.layers = layers
        self.clock = clock
        self.family = family
        self.always = always
        self.reset()

    def reset(self) -> None:
        """Forgets the latest run; the next model call begins a new one."""
        self.clock.reset()
        self._forget_run()

    def begin_call(self, timestep: Tensor | float | None) -> None:
        """Moves to the step of a model call."""
        if self.clock.tick(timestep):
            self._forget_run()
        self._positions: dict[int, tuple[Position, str]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Answers an attention call over a layer's whole sequence, and notes how."""
        layer: AttentionLayer = call.layer
        layout: Any = call.layout  # where it is unknown, `obstacle` says so
        position, reason = self._scheduled(layer)
        if not reason:
            reason = obstacle(call)
            if reason:
                call.attached.state.warn_once(layer, reason)
        visited = None
        if not reason:
            plan = self._plan(layer, layout, call.query)
            reason, visited = plan
        if reason:
            self.record(layer, layout, reason)
            return call.dense()
        attended = self.method.compute(call.attached.state.inputs(call), position)
        self.record(layer, layout, attended.why_dense, attended.density, visited)
        return attended.output

    def record(
        self,
        layer: AttentionLayer,
        layout: TokenLayout | None,
        reason: str,
        density: Tensor | float = 1.0,
        visited: Visited | None = None,
    ) -> None:
        """Records one call of a layer; `reason` says why it ran dense, "" if it did not."""
        self._logs[layer.name].record(layout, density, reason, visited)
        if self.clock.step is not None:
            self._steps.setdefault(self.clock.step, StepLog()).record(reason)

    def report(self, component: str, model: str, skipped: dict[str, str]) -> DenoiserReport:
        """Returns what happened in the latest run; waits for the device.

        Args:
            component: Name of the denoiser within its pipeline, "" for a bare model.
            model: Class name of the denoiser.
            skipped: Path of every other attention layer -> why the method does not serve it.
        """
        return DenoiserReport(
            component=component,
            model=model,
            family=self.family,
            method=repr(self.method),
            layers=tuple(LayerReport.of(layer, self._logs[layer.name]) for layer in self.layers),
            skipped=skipped,
            steps=len(self._steps),
            dense_steps={
                step: ", ".join(log.dense_calls)
                for step, log in sorted(self._steps.items())
                if not log.sparse_calls
            },
        )

    def _scheduled(self, layer: AttentionLayer) -> tuple[Position, str]:
        """Returns where a layer's call stands, and why the schedule makes it dense."""
        known = self._positions.get(layer.index)
        if known is None:
            position = Position(layer.index, self.clock.step, self.clock.progress)
            known = position, self.method.schedule_reason(position)
            self._positions[layer.index] = known
        return known

    def _plan(self, layer: AttentionLayer, layout: TokenLayout, query: Tensor) -> Plan:
        """Returns what is expected of a layer on query (B, N, H, D)."""
        key = (layer.name, layout, query.shape)
        known = self._plans.get(key)
        if known is None:
            reason = self.method.shape_reason(layout)
            if not reason and not self.always:
                reason = slower_reason(
                    self.method, layout, query.shape, query.dtype, device_facts(query.device)
                )
            visited = None if reason else self.method.visited(layout, query, layer.index)
            known = self._plans[key] = Plan(reason, visited)
        return known

    def _forget_run(self) -> None:
        self._logs = {layer.name: LayerLog() for layer in self.layers}
        self._steps: dict[int, StepLog] = {}
        self._positions = {}
        self._plans: dict[tuple[str, TokenLayout, torch.Size], Plan] = {}
