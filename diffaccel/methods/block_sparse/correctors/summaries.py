"""Left-out blocks as summaries that every query weighs for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels import Centroids
from diffaccel.methods.block_sparse.block_call import BlockCall, Chosen
from diffaccel.methods.block_sparse.correctors.base import Corrector, KernelOutput, Summary
from diffaccel.methods.block_sparse.correctors.value_term import add_value_term
from diffaccel.methods.block_sparse.sampled_rows import SampledRows, sampled_rows, spread_rows

Fit = Literal["output", "normaliser", "none"]

DAMPINGS = (0.0, 0.5, 1.0, 1.5)  # a finer grid lessens errors by 3 % at most
SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
LARGEST_DAMPING = 2.0  # of the search by the normaliser; 1 is the undamped second order
BISECTIONS = 12
_HEAD_DIM = 128  # that costs are told for


@dataclass(frozen=True, slots=True)
class BlockSummaries(Corrector):
    """Lets every query weigh the left-out blocks itself, by their mean key and its variance.

    A left-out block m of n_m keys enters the softmax of query q as one key with

        score  s * q . mean_m + log n_m + damping * s**2 / 2 * sum_d(q_d**2 * var_md) + shift
        value  mean value of the block

    that is, the cumulant expansion of the block's share of the attention up to second order. At
    full strength the second order overshoots where keys are far from normally distributed, and
    even the right share is of little use on a wrong value; so `damping` and `shift` are set for
    each head by what they do to the output of a few query rows, spread over the sequence, whose
    attention over all keys is computed for it. Blocks whose keys and values are all equal are
    exact if nothing is fitted, and up to the shift that fits the others best if it is. Rows,
    unlike query blocks, have no borders, so that pictures have none. Own design. Per-row block
    means in the softmax are also the approach of "PISA" (2026, https://arxiv.org/abs/2602.01077),
    with another first-order term and no second.

    Args:
        variance: Whether the second order is used. Costs, in terms of dense attention,
            .5 / block.
        fit: "output": damping and shift with the least error of the output; costs `rows` of N
            rows. "normaliser": the damping that gives the right normaliser on average, without
            shift, at the same cost. "none": damping 1, shift 0.
        value_term: Whether the first order of what the values do within a block is added, see
            `add_value_term`. Costs D / (2 * block**2) + D / N.
        rows: Query rows per head that are computed exactly, at least 1.
    """

    variance: bool = True
    fit: Fit = "output"
    value_term: bool = True
    rows: int = 32

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.fit not in get_args(Fit):
            raise ValueError(
                f"fit must be one of {', '.join(get_args(Fit))}, got fit={self.fit!r}; choose one"
            )
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got rows={self.rows}; 32 is enough")
        if self.fit == "normaliser" and not self.variance:
            raise ValueError(
                "fit='normaliser' damps the variance, got variance=False; use fit='output'"
            )
        if self.value_term and self.fit != "output":
            raise ValueError(
                f"value_term needs fit='output', got fit={self.fit!r}; its strength is fitted on "
                "the output too"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Mean values, and variances of keys."""
        return frozenset({"value_mean"} | ({"key_variance"} if self.variance else set()))

    @property
    def needs_tail(self) -> bool:
        """The value term is weighted by it."""
        return self.value_term

    def added_cost(self, length: int, block: int) -> float:
        """Scores and values of the summaries, the exact rows, the covariances."""
        cost = (1.5 if self.variance else 1.0) / block
        if self.fit != "none":
            cost += 1.5 * self.rows / length
        if self.value_term:
            cost += _HEAD_DIM / (2 * block**2) + _HEAD_DIM / length
        return cost

    def summarise(self, chosen: Chosen) -> Summary:
        """Summarises the key blocks; `variance` is damped already."""
        centroids = self.unfitted(chosen.call)
        if self.fit == "none":
            return Summary(centroids)
        known = chosen.fitted or {}
        if "damping" in known:
            return Summary(adjusted(centroids, known["damping"], known["shift"]))
        length, device = chosen.call.visual.query.shape[1], centroids.key.device
        sample = sampled_rows(chosen, spread_rows(length, self.rows, device))
        damping, shift = self.adjustment(centroids, sample)
        if chosen.fitted is not None:
            chosen.fitted.update(damping=damping, shift=shift)
        return Summary(adjusted(centroids, damping, shift), sample if self.value_term else None)

    def unfitted(self, call: BlockCall) -> Centroids:
        """The summaries of all key blocks with damping 1 and shift 0."""
        statistics = call.statistics
        log_count = statistics.counts.log()[:, None].expand(statistics.key_mean.shape[:3])
        variance = statistics.key_variance if self.variance else None
        return Centroids(statistics.key_mean, statistics.value_mean, log_count, variance)

    def fitted(self, centroids: Centroids, sample: SampledRows) -> Centroids:
        """Changes summaries so that they suit sampled rows best, head by head."""
        if self.fit == "none":
            return centroids
        return adjusted(centroids, *self.adjustment(centroids, sample))

    def adjustment(self, centroids: Centroids, sample: SampledRows) -> tuple[Tensor, Tensor]:
        """Finds damping and shift, (B, H) fp32 each, that suit sampled rows best."""
        expansion = _expansion(centroids, sample)
        if self.fit == "output":
            return _by_output(centroids.value, sample, expansion)
        damping = _by_normaliser(sample, *expansion)
        return damping, torch.zeros_like(damping)

    def finish(self, chosen: Chosen, summary: Summary | None, attended: KernelOutput) -> Tensor:
        """Adds the value term."""
        if summary is None or not self.value_term:
            return attended.output
        return add_value_term(chosen, summary.sample, attended)


def adjusted(centroids: Centroids, damping: Tensor, shift: Tensor) -> Centroids:
    """Damps the variance of summaries and shifts their masses, by (B, H) fp32 each."""
    key, value, log_count, variance = centroids
    if variance is not None:
        variance = variance * damping[..., None, None]
    return Centroids(key, value, log_count + shift[..., None], variance)


class Expansion(NamedTuple):
    """Scores of summaries for sampled rows less their peak, (B, H, R, NB) fp32 each.

    Args:
        first: Up to the first order, -inf for blocks that are computed.
        second: The second order at full strength, or None.
    """

    first: Tensor
    second: Tensor | Any


def predicted(centroids: Centroids, sample: SampledRows) -> Tensor:
    """What sampled rows get from their kept blocks and from summaries: (B, H, R, D) fp32."""
    first, second = _expansion(centroids, sample)
    weights = (first if second is None else first + second).exp()
    total = sample.kept_sum + weights @ centroids.value
    return total / (sample.kept_mass + weights.sum(-1))[..., None]


def _expansion(centroids: Centroids, sample: SampledRows) -> Expansion:
    first = sample.query @ centroids.key.mT + centroids.log_count[..., None, :]
    first = (first - sample.peak[..., None]).masked_fill(~sample.left_out, -torch.inf)
    if centroids.variance is None:
        return Expansion(first, None)
    return Expansion(first, (sample.query.square() * 0.5) @ centroids.variance.mT)


def _by_output(value: Tensor, sample: SampledRows, expansion: Expansion) -> tuple[Tensor, Tensor]:
    """Finds damping and shift, (B, H) fp32 each, with the least error of the sampled rows."""
    first, second = expansion
    shifts = first.new_tensor(SHIFTS)
    factors = shifts.exp().view(-1, 1)
    errors = []
    for damping in (0.0,) if second is None else DAMPINGS:
        weights = (first if second is None else first + damping * second).exp()
        mass = sample.kept_mass[:, :, None] + factors * weights.sum(-1)[:, :, None]
        total = (weights @ value)[:, :, None] * factors[..., None]
        output = (sample.kept_sum[:, :, None] + total) / mass[..., None]
        error = (output - sample.exact[:, :, None]).square().sum(-1)  # (B, H, shifts, R)
        errors.append(error.masked_fill(~sample.is_real[:, :, None], 0.0).sum(-1))
    error = torch.stack(errors, 2).nan_to_num(nan=torch.inf).flatten(2)
    best = error.argmin(-1)
    return first.new_tensor(DAMPINGS)[best // len(SHIFTS)], shifts[best % len(SHIFTS)]


def _by_normaliser(sample: SampledRows, first: Tensor, second: Tensor) -> Tensor:
    """Finds the damping (B, H) fp32 with which sampled rows have the right normaliser."""
    exact = sample.all_mass.log()
    low = torch.zeros_like(exact[..., 0])
    high = torch.full_like(low, LARGEST_DAMPING)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        estimate = (first + middle[..., None, None] * second).logsumexp(-1)
        excess = torch.logaddexp(sample.kept_mass.log(), estimate) - exact
        excess = excess.masked_fill(~(excess.isfinite() & sample.is_real), 0.0)
        is_high = excess.mean(-1) > 0
        low, high = torch.where(is_high, low, middle), torch.where(is_high, middle, high)
    return (low + high) / 2
