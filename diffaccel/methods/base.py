"""What every attention method is: a frozen configuration with one public entry, `attend`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor

from diffaccel.layout import TokenLayout
from diffaccel.methods.inputs import Attended, AttentionInputs, Position
from diffaccel.methods.published import published

if TYPE_CHECKING:
    from typing_extensions import Self

DenseLayers = tuple[int, ...] | int | None
SCHEDULE = (
    "dense_steps",
    "dense_layers",
    "keep_end",
    "drop_end",
    "reuse",
    "reuse_passes",
    "hysteresis",
)


class Visited(NamedTuple):
    """How much a kernel computes, as shares of all N x N query-key pairs.

    Args:
        visited: What it computes, pairs that it masks included.
        ideal: What it would compute if its tiles fitted the windows perfectly.
    """

    visited: float
    ideal: float


@dataclass(frozen=True, slots=True, repr=False)
class Method:
    """Maps query, key, value and their token layout to an attention output.

    A subclass is a frozen, slotted dataclass whose fields are its whole configuration, and
    implements `compute`. Slots make each class anew, after which `super()` without arguments
    fails: methods name their base class instead.
    """

    def __repr__(self) -> str:
        """Reproduces the method: its own knobs first, those of the schedule last."""
        knobs = sorted(fields(self), key=lambda f: (f.kw_only, f.name in SCHEDULE))
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in knobs if f.repr)
        return f"{type(self).__name__}({shown})"

    @property
    def compares_heads(self) -> bool:
        """Whether what one head gives depends on the others, so that ranks cannot share them."""
        return False

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        layer: int | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Computes self-attention over one sequence.

        Where gradients are needed (they are enabled, and query, key or value requires them),
        methods that are not exact run dense, whose backward is PyTorch's; `attend_with_density`
        says so. Under `torch.autocast` the inputs are cast as those of PyTorch's SDPA are.

        Args:
            query: (B, N, H, D), any float dtype, position embedding already applied.
            key: (B, N, H, D).
            value: (B, N, H, D).
            layout: What the N tokens are; `layout.length` must be N.
            scale: Factor on the logits, D ** -0.5 by default.
            key_padding_mask: (B, N) bool, True where a token may be attended. Output rows of
                padded queries are meaningless.
            layer: Index among the attached layers, for `dense_layers`; None means unscheduled.
            step: Index of the denoising step, for `dense_steps`; None means unscheduled.
            progress: Share of the schedule that lies behind, 0 to 1, for the methods that follow
                it; None means unscheduled.

        Returns:
            (B, N, H, D) in the dtype of query, or in that of autocast. fp64 is computed in fp64 on
            a CPU, apart from estimates of what is left out; on a GPU block-sparse methods compute
            it in fp32.
        """
        inputs = AttentionInputs.checked(query, key, value, layout, scale, key_padding_mask)
        return self.run(inputs, Position(layer, step, progress)).output

    def attend_with_density(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, **options: Any
    ) -> tuple[Tensor, Tensor | float]:
        """Like `attend`, with its arguments, and says which part of the work was done.

        Returns:
            The output (B, N, H, D), and the share of the N x N query-key pairs that were
            computed exactly: 1.0 where the call ran dense, else a number or a 0-dim fp32 tensor
            on the device of query (reading it is the caller's synchronisation).
        """
        scale, mask = options.pop("scale", None), options.pop("key_padding_mask", None)
        inputs = AttentionInputs.checked(query, key, value, layout, scale, mask)
        attended = self.run(inputs, Position(**options))
        return attended.output, attended.density

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuses to be an attention processor, which `model.set_attn_processor` makes of it."""
        raise TypeError(
            f"{type(self).__name__} is a method, not an attention processor: instead of "
            "model.set_attn_processor(method) write diffaccel.set_attn_processor(model, method) "
            "or pipe.set_attn_processor(method), on a freshly loaded model"
        )

    def run(self, inputs: AttentionInputs, position: Position) -> Attended:
        """Computes a call, densely where schedule or shape ask for it."""
        method = self.scheduled(position)
        reason = method.schedule_reason(position) or method.shape_reason(inputs.layout)
        if reason:
            return Attended(inputs.dense(), 1.0, reason)
        return method.compute(inputs, position)

    def scheduled(self, position: Position) -> Self:
        """Returns the method as it is at a position: what follows the schedule has its value."""
        return self

    def compute(self, inputs: AttentionInputs, position: Position) -> Attended:
        """Computes a call that neither `schedule_reason` nor `shape_reason` makes dense.

        What follows the schedule is settled already (`scheduled`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement compute")

    def schedule_reason(self, position: Position) -> str:
        """Says why a call at this position runs dense, "" where it does not."""
        return ""

    def shape_reason(self, layout: TokenLayout) -> str:
        """Says why a layout runs dense whatever the data, "" where it does not."""
        return ""

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Predicts the share of the query-key pairs that is computed exactly.

        None where only a run tells. The schedule is not looked at; a floor on the attention mass
        may keep more.
        """
        return None

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Predicts the time of the attention kernel in terms of dense attention.

        Args:
            layout: The tokens.
            device: Type of the device, "cpu" or "cuda".

        Returns:
            Share of the dense time, without what selecting costs; None where the method runs
            dense itself.
        """
        return None

    def visited(
        self, layout: TokenLayout, query: Tensor, layer: int | None = None
    ) -> Visited | None:
        """Says what the kernel computes for a query (B, N, H, D) on its device.

        None where that is what the density says, or where the method runs dense.
        """
        return None

    def resolved(
        self, family: str, num_layers: int, expert: int = 0, steps: int | None = None
    ) -> Self:
        """Fills knobs that are None with the values published for a model family.

        Args:
            family: A name from `diffaccel.methods.published.PUBLISHED`. A family without
                published values resolves to 0 dense steps, no dense layers.
            num_layers: Number of layers that the method is attached to in this model.
            expert: Which denoiser of a pipeline with several (Wan 2.2 A14B: 0 = high noise,
                1 = low noise). Steps then count from the first step of that expert.
            steps: Steps of the schedule of a run. Where it has fewer than the published one,
                published dense steps take no larger share of it: 5 of 50 are 2 of 20 and none
                of 4. None leaves them as published.

        Returns:
            A method of the same class whose schedule knobs are all set.
        """
        values = published(family)
        known = {
            "dense_steps": values.dense_steps_of(expert, steps),
            "dense_layers": values.dense_layers_of(num_layers),
            "first_frame": values.first_frame,
        }
        unset = {
            field.name: known[field.name]
            for field in fields(self)
            if field.name in known and getattr(self, field.name) is None
        }
        return replace(self, **unset)


@dataclass(frozen=True, slots=True, repr=False)
class ScheduledMethod(Method):
    """A method that leaves some steps and layers dense.

    Args:
        dense_steps: First denoising steps that run dense: their number, or as a float above 0
            and below 1 a share of the schedule, in which a step must end to be dense (0.2 are 10
            of 50 steps and none of 4). None: as published for the model family, a smaller number
            in runs of fewer steps than the published ones (`resolved`), 0 without a model and
            for families without a published value.
        dense_layers: Layers that run dense: a tuple of indices, or the number of first layers.
            None: as published, none without a model and for families without a published value.
    """

    _: KW_ONLY
    dense_steps: int | float | None = None
    dense_layers: DenseLayers = None

    def __post_init__(self) -> None:
        steps = self.dense_steps
        is_share = isinstance(steps, float) and 0.0 < steps < 1.0
        if steps is not None and not is_share and not (isinstance(steps, int) and steps >= 0):
            raise ValueError(
                "dense_steps must be None, an integer of at least 0 or a share of the schedule "
                f"above 0 and below 1, got dense_steps={steps}; None takes the value published "
                "for the model family"
            )
        first = self.dense_layers
        layers = first if isinstance(first, tuple) else (first or 0,)
        if not all(isinstance(layer, int) and layer >= 0 for layer in layers):
            raise ValueError(
                "dense_layers must be None, a number of first layers or a tuple of layer indices "
                f"of at least 0, got dense_layers={first}"
            )

    def schedule_reason(self, position: Position) -> str:
        steps = self.dense_steps or 0
        if isinstance(steps, float):
            is_early = position.is_within(steps)
        else:
            is_early = position.step is not None and position.step < steps
        if is_early:
            return f"dense_steps={steps}"
        layers, layer = self.dense_layers or 0, position.layer
        if layer is None:
            return ""
        is_dense = layer < layers if isinstance(layers, int) else layer in layers
        return f"dense_layers={layers}" if is_dense else ""
