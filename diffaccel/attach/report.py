"""Report of an attachment: which layers a method served, how sparsely, and what ran dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffaccel.layout import TokenLayout

if TYPE_CHECKING:
    from diffaccel.methods.base import Visited


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer that the method was attached to.

    Args:
        name: Path of the layer inside the denoiser.
        kind: "joint" (visual and text tokens) or "self" (visual tokens).
        layout: Its tokens at the last call, None before the first.
        sparse_calls: Calls that the method answered sparsely.
        dense_calls: Reason -> number of calls that ran dense for it.
        density: Mean share of query-key pairs computed exactly, dense calls counted as 1.
        pairs: Query-key pairs of all calls, the weight of this layer in an overall density.
        visited: What the kernel computed in the latest sparse call and what it would have with
            tiles that fit, where that differs from the pairs that count.
        ranks: Processes that shared the heads of the latest call (context parallelism), 1 where
            this one computed all. Densities are of all heads.
        left_out: Calls in which guidance of the pipeline left the attention out, so that nothing
            was computed (LTX-2's spatio-temporal guidance, perturbed attention of guiders).
        error: Mean relative error of the output, as a method with `max_error` measures it on
            sampled rows; None where none does.
        worst_error: The largest of them.
        orders: Orders of the tokens that a method chose by itself, one for each layout.
        reused_calls: Sparse calls that took the block lists of an earlier step.
    """

    name: str
    kind: str
    layout: TokenLayout | None
    sparse_calls: int
    dense_calls: dict[str, int]
    density: float | None
    pairs: int
    visited: Visited | None = None
    ranks: int = 1
    left_out: int = 0
    error: float | None = None
    worst_error: float | None = None
    orders: tuple[str, ...] = ()
    reused_calls: int = 0

    def __str__(self) -> str:
        if not self.sparse_calls and not self.dense_calls and not self.left_out:
            return f"{self.name} ({self.kind}): not called"
        parts = [f"{self.name} ({self.kind}, {_describe(self.layout)})"]
        if self.density is not None:
            parts.append(f"density {self.density:.3f}")
        if self.visited is not None:
            parts.append(f"visited {self.visited.visited:.3f} (ideal {self.visited.ideal:.3f})")
        if self.ranks > 1:
            parts.append(f"heads shared by {self.ranks} ranks")
        if self.error is not None:
            parts.append(f"error {self.error:.3f}, at most {self.worst_error:.3f}")
        if self.orders:
            parts.append(f"order {' and '.join(self.orders)}")
        reused = f" ({self.reused_calls} with earlier block lists)" if self.reused_calls else ""
        parts.append(f"{self.sparse_calls} sparse{reused}")
        parts += [f"{count} dense: {reason}" for reason, count in self.dense_calls.items()]
        if self.left_out:
            parts.append(f"{self.left_out} without attention, which guidance left out")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class DenoiserReport:
    """One denoiser that a method was attached to; numbers describe its latest run.

    Args:
        component: Name within the pipeline ("transformer"), "" for a bare model.
        model: Class name.
        family: Whose published settings filled the method's schedule.
        method: repr of the method with its schedule filled in.
        layers: The layers that the method serves.
        skipped: Path of every other attention layer -> why it kept its own attention.
        steps: Denoising steps seen.
        dense_steps: Index of every step with dense calls alone -> reason.
        idle_steps: Index of every step in which no layer was called, since a cache answered.
    """

    component: str
    model: str
    family: str
    method: str
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    steps: int
    dense_steps: dict[int, str]
    idle_steps: tuple[int, ...] = ()

    @property
    def density(self) -> float | None:
        """Mean density over all attached layers and steps, dense ones included."""
        return _overall_density(self.layers)

    def __str__(self) -> str:
        name = f"{self.component} ({self.model})" if self.component else self.model
        lines = [f"{name}: {self.method} on {len(self.layers)} layers, family {self.family}"]
        if self.density is not None:
            lines.append(f"  density {self.density:.3f}, steps {self.steps}")
        if self.idle_steps:
            lines.append(f"  steps without attention: {len(self.idle_steps)} (a cache answered)")
        lines += [f"  dense steps {span}: {reason}" for span, reason in self._dense_spans()]
        lines += [
            f"  {layer.name} ({layer.kind}): {self.skipped[layer.name]}"
            if layer.name in self.skipped
            else f"  {layer}"
            for layer in self.layers
        ]
        skipped = Counter(self.skipped.values())
        lines += [f"  not attached: {count} ({reason})" for reason, count in skipped.items()]
        return "\n".join(lines)

    def _dense_spans(self) -> list[tuple[str, str]]:
        """Joins consecutive dense steps that share their reason: [("0-4", reason), ...]."""
        spans: list[list[int]] = []
        for step, reason in self.dense_steps.items():
            if spans and self.dense_steps.get(step - 1) == reason:
                spans[-1][1] = step
            else:
                spans.append([step, step])
        return [
            (str(first) if first == last else f"{first}-{last}", self.dense_steps[first])
            for first, last in spans
        ]


@dataclass(frozen=True, slots=True)
class Report:
    """What an attachment did in the latest run of each denoiser; str() gives a readable text."""

    denoisers: tuple[DenoiserReport, ...]

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """The attached layers of all denoisers."""
        return tuple(layer for denoiser in self.denoisers for layer in denoiser.layers)

    @property
    def calls(self) -> int:
        """Attention calls of all layers, sparse and dense."""
        return sum(layer.sparse_calls + sum(layer.dense_calls.values()) for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Reason -> calls of all layers that ran dense for it, the most frequent first."""
        counts: Counter[str] = Counter()
        for layer in self.layers:
            counts.update(layer.dense_calls)
        return dict(counts.most_common())

    @property
    def density(self) -> float | None:
        """Mean density over all denoisers, weighted by their query-key pairs."""
        return _overall_density(self.layers)

    def __str__(self) -> str:
        return "\n".join(str(denoiser) for denoiser in self.denoisers)


def _overall_density(layers: Iterable[LayerReport]) -> float | None:
    called = [(layer.density, layer.pairs) for layer in layers if layer.density is not None]
    pairs = sum(pairs for _, pairs in called)
    return sum(density * pairs for density, pairs in called) / pairs if pairs else None


def _describe(layout: TokenLayout | None) -> str:
    """Describes a layout in words, such as "text 512 + visual 1x64x48"."""
    if layout is None:
        return "layout unknown"
    return " + ".join(
        f"{part.kind} {part.length if part.grid is None else 'x'.join(map(str, part.grid))}"
        for part in layout.segments
    )
