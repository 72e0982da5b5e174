"""State of a method on one denoiser: where it is in a run, and what its layers did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from diffaccel.attach.forecast import device_facts, slower_reason
from diffaccel.attach.obstacles import (
    parallelism,
    planned_obstacle,
    skipped_scores,
    unsupported_mask,
)
from diffaccel.attach.report import DenoiserReport, LayerReport
from diffaccel.errors import ModelError
from diffaccel.methods.inputs import GRADIENTS_NEEDED, Position
from diffaccel.methods.memory import LayerMemory

if TYPE_CHECKING:
    from torch import Tensor

    from diffaccel.attach.call import AttentionCall
    from diffaccel.attach.step_clock import StepClock
    from diffaccel.bindings import AttentionLayer
    from diffaccel.layout import TokenLayout
    from diffaccel.methods.base import Method, Visited


@dataclass(slots=True)
class LayerLog:
    """What one layer did so far in a run. Densities stay on the device until they are read."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    pairs: int = 0
    kept_pairs: Tensor | float = 0.0
    layout: TokenLayout | None = None
    visited: Visited | None = None
    ranks: int = 1
    errors: int = 0
    error_sum: Tensor | float = 0.0
    worst_error: Tensor | float = 0.0

    def note_error(self, error: Tensor | None) -> None:
        """Adds the measured error of one call, where its method measures it."""
        if error is not None:
            self.errors += 1
            self.error_sum = self.error_sum + error
            self.worst_error = error.clamp_min(self.worst_error)

    def record(
        self,
        layout: TokenLayout | None,
        density: Tensor | float,
        reason: str,
        visited: Visited | None = None,
    ) -> None:
        """Adds one call.

        Args:
            layout: The tokens of the call, where known.
            density: Share of the query-key pairs that were computed exactly.
            reason: Why the call ran dense, "" if it was sparse.
            visited: What the kernel computed, where that differs.
        """
        self.visited = visited or self.visited
        if reason:
            self.dense_calls[reason] += 1
        else:
            self.sparse_calls += 1
        if layout is not None:
            self.layout = layout
            self.pairs += layout.length**2
            self.kept_pairs = self.kept_pairs + density * layout.length**2

    def report(self, layer: AttentionLayer, memory: LayerMemory) -> LayerReport:
        """Returns what happened so far; waits for the device."""
        return LayerReport(
            name=layer.name,
            kind=layer.kind,
            layout=self.layout,
            sparse_calls=self.sparse_calls,
            dense_calls=dict(self.dense_calls),
            density=float(self.kept_pairs) / self.pairs if self.pairs else None,
            pairs=self.pairs,
            visited=self.visited,
            ranks=self.ranks,
            left_out=self.left_out,
            error=float(self.error_sum) / self.errors if self.errors else None,
            worst_error=float(self.worst_error) if self.errors else None,
            orders=tuple(dict.fromkeys(memory.orders.values())),
            reused_calls=memory.reused_calls,
        )


@dataclass(slots=True)
class StepLog:
    """Calls of all layers in one denoising step."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)

    def record(self, reason: str) -> None:
        """Adds one call; `reason` says why it ran dense, "" if it did not."""
        if reason:
            self.dense_calls[reason] += 1
        else:
            self.sparse_calls += 1


class Plan(NamedTuple):
    """What holds for a layer and a shape.

    Args:
        obstacle: Why no method could serve the call, "" where one can.
        why_dense: Why the call runs dense, "" where it does not.
        visited: What the kernel computes, where that is not what the density says.
    """

    obstacle: str
    why_dense: str
    visited: Visited | None


class Scheduled(NamedTuple):
    """What holds for a layer in one model call.

    Args:
        position: Where it stands.
        method: The method there.
        why_dense: Why the schedule makes the call dense, "" where it does not.
    """

    position: Position
    method: Method
    why_dense: str


MOST_PLANS = 1024
"""Plans that are kept; a model has one for each layer and size."""


class MethodState:
    """The mutable state of a method that is attached to one denoiser.

    Args:
        method: What to compute.
        layers: The layers that the method serves.
        clock: Step position.
        family: The model family, for the report.
        always: Whether the method runs even where dense attention is expected to be faster.
        expert: Which denoiser of a pipeline with several.

    Attributes:
        method: What to compute, its schedule filled in: that of the latest run, whose number of
            steps counts, or before any run as published.
        check: Whether outputs that are not finite are errors; waits for the device.
    """

    def __init__(
        self,
        method: Method,
        layers: tuple[AttentionLayer, ...],
        clock: StepClock,
        family: str,
        always: bool = False,
        expert: int = 0,
    ) -> None:
        self._asked, self._expert = method, expert
        self.method = method.resolved(family, len(layers), expert)
        self.layers = layers
        self.clock = clock
        self.family = family
        self.always = always
        self.check = False
        self.warned: set[str] = set()
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the latest run; the next model call begins a new one."""
        self.clock.reset()
        self._forget_run()

    def begin_call(self, timestep: Tensor | float | None, pipe: Any) -> bool:
        """Moves to the step of a model call, and returns whether it begins a run.

        Args:
            timestep: As the model gets it.
            pipe: The pipeline that makes the call, None where the model is called by hand.
        """
        is_new = self.clock.tick(timestep, pipe)
        if is_new:
            self._forget_run()
            self._follow(self.clock.total)
        if self.clock.step is not None:  # a step counts where caches leave all layers out as well
            self._steps.setdefault(self.clock.step, StepLog())
        self._positions: dict[int, Scheduled] = {}
        return is_new

    def attend(self, call: AttentionCall) -> Tensor:
        """Answers an attention call over a layer's whole sequence, and notes how."""
        attached = call.attached
        layer, state = attached.layer, attached.state
        layout: Any = call.layout  # where it is unknown, that is an obstacle
        if skipped_scores(call):
            self.leave_out(layer, layout)
            return call.dense()
        density: Tensor | float = 1.0
        visited: Visited | None = None
        position, method, reason = self._scheduled(layer)
        if not reason:
            reason = parallelism(call)
            plan = self._plan(call, layout, method)
            reason = reason or plan.obstacle or unsupported_mask(call)
            if reason:
                state.warn_once(layer, reason)
            reason = reason or plan.why_dense
            if not reason and call.needs_gradients:
                reason = GRADIENTS_NEEDED
                state.warn_once(layer, reason)
        if reason:
            output = call.dense()
        else:
            attended = state.compute(call, layout, method, position)
            output, density, reason, error = attended
            self._logs[layer.name].note_error(error)
            visited = plan.visited
        self._logs[layer.name].ranks = 1 if call.share is None else call.share.ranks
        if call.share is not None:  # on every rank, whatever each of them did
            density = call.share.mean(density, output.device)
        self.record(layer, layout, reason, density, visited)
        return output

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

    def leave_out(self, layer: AttentionLayer, layout: TokenLayout | None) -> None:
        """Records one call of a layer in which the pipeline left its attention out."""
        log = self._logs[layer.name]
        log.left_out += 1
        log.layout = layout or log.layout

    def check_parallel(self, context: Any) -> None:
        """Refuses context parallelism where heads cannot be computed apart.

        Raises:
            ModelError: The method is such a one.
        """
        if self.method.compares_heads:
            ranks = context.ring_degree * context.ulysses_degree
            raise ModelError(
                f"{self.method!r} compares tokens over all heads of a layer, which context "
                f"parallelism shares among {ranks} ranks; use another method such as "
                "diffaccel.SparseAttn(), or do without enable_parallelism"
            )

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
            layers=tuple(
                self._logs[layer.name].report(layer, self._memories[layer.index])
                for layer in self.layers
            ),
            skipped=skipped,
            steps=len(self._steps),
            dense_steps={
                step: ", ".join(log.dense_calls)
                for step, log in sorted(self._steps.items())
                if log.dense_calls and not log.sparse_calls
            },
            idle_steps=tuple(
                step
                for step, log in sorted(self._steps.items())
                if not log.sparse_calls and not log.dense_calls
            ),
        )

    def forget(self) -> None:
        """Lets go of what layers remember; the report of the latest run stays."""
        for memory in self._memories.values():
            memory.forget()

    def _follow(self, steps: int | None) -> None:
        """Fills in the schedule for a run of so many steps."""
        method = self._asked.resolved(self.family, len(self.layers), self._expert, steps)
        if method != self.method:
            self.method = method
            self._plans.clear()

    def _scheduled(self, layer: AttentionLayer) -> Scheduled:
        """Returns what holds for a layer in the current model call."""
        known = self._positions.get(layer.index)
        if known is None:
            clock = self.clock
            # Without steps nobody can tell where a run ends, and with it what may be remembered.
            memory = None if clock.step is None else self._memories[layer.index]
            position = Position(layer.index, clock.step, clock.progress, clock.ends, memory)
            method = self.method.scheduled(position)
            known = Scheduled(position, method, method.schedule_reason(position))
            self._positions[layer.index] = known
        return known

    def _plan(self, call: AttentionCall, layout: TokenLayout | None, method: Method) -> Plan:
        """Returns what holds for a layer and a shape; asked once for each."""
        layer, query = call.attached.layer, call.query
        shapes = layout, query.shape, query.dtype, call.key.shape
        key: tuple[Any, ...] = (layer.name, *shapes, bool(call.options))
        if method is not self.method:  # it follows the schedule
            key = *key, method
        known = self._plans.get(key)
        if known is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            known = self._plans[key] = self._new_plan(call, layout, method)
        return known

    def _new_plan(self, call: AttentionCall, layout: Any, method: Method) -> Plan:
        found = planned_obstacle(call)
        if found:
            return Plan(found, "", None)
        reason = method.shape_reason(layout)
        if not reason and not self.always:
            query = call.query
            facts = device_facts(query.device)
            reason = slower_reason(method, layout, query.shape, query.dtype, facts)
        if reason:
            return Plan("", reason, None)
        return Plan("", "", method.visited(layout, call.query, call.layer.index))

    def _forget_run(self) -> None:
        self._logs = {layer.name: LayerLog() for layer in self.layers}
        self._steps: dict[int, StepLog] = {}
        self._positions = {}
        self._memories = {layer.index: LayerMemory() for layer in self.layers}
