"""A budget that promises an error: how much each head must compute for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels import Centroids
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.budgets import Ask
from diffaccel.methods.block_sparse.correctors.base import Corrector
from diffaccel.methods.block_sparse.correctors.summaries import BlockSummaries, predicted
from diffaccel.methods.block_sparse.sampled_rows import BlockSums, block_sums, spread_rows

if TYPE_CHECKING:
    from diffaccel.methods.block_sparse.parts import Parts

SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 1.0)
"""Shares of the blocks among which each head gets one."""

CHECKED_ROWS = 128
SAFETY = 1.15
"""Quantile .95 of the true error over the one that so many fresh rows show."""

_PRICES = torch.logspace(-4, 4, 65).tolist()


class Promise(NamedTuple):
    """What a call must compute so that its error stays below a bound.

    Args:
        keep: (B, H) fp32, share of the blocks for each head.
        rows: (R,) int64, query rows whose exact attention is known, in block order.
        exact: (B, R, H, D) fp32, that attention.
        is_real: (B, R, 1, 1) bool, False for padded rows.
    """

    keep: Tensor
    rows: Tensor
    exact: Tensor
    is_real: Tensor

    def error(self, output: Tensor) -> Tensor:
        """Relative error of an output (B, N, H, D) over these rows, all samples: 0-dim fp32."""
        difference = (output[:, self.rows].float() - self.exact).masked_fill(~self.is_real, 0.0)
        norm = self.exact.masked_fill(~self.is_real, 0.0).norm()
        return difference.norm() / norm.clamp_min(1e-30)


def promised(call: BlockCall, parts: Parts, forced: Tensor | None, max_error: float) -> Promise:
    """Finds the least that every head must compute.

    The attention over all keys of 128 query rows tells, for each head and each of a few shares
    of the blocks, which error the summaries would make (without their value term, which lessens
    it), fitted on other rows. Of the ways to give each head a share, the one with the least sum
    is taken whose error over all heads stays below the bound. Costs about 160 of N rows of dense
    attention, and a fit for each share.

    Args:
        call: The call.
        parts: Selector, budget and corrector.
        forced: (NB, NB) bool, blocks that are kept whatever their score, or None.
        max_error: Relative error |output - dense| / |dense| over all visual rows and heads of a
            sample that is promised.

    Returns:
        What to keep, and the rows on which the error can be measured.
    """
    corrector = parts.corrector
    length, device = call.visual.query.shape[1], call.visual.query.device
    check = spread_rows(length, CHECKED_ROWS, device, offset=0.5)
    rows = check
    if isinstance(corrector, BlockSummaries):
        rows = torch.cat([check, spread_rows(length, corrector.rows, device)])
    centroids = corrector.unfitted(call) if isinstance(corrector, BlockSummaries) else None
    choices = _choices(BlockRows(call, rows // call.block), parts, forced)
    is_real = torch.ones(1, 1, len(rows), dtype=torch.bool, device=device)
    if call.visual.valid is not None:
        is_real = call.visual.valid[:, None, rows]
    each_error, exact = [], []
    for head in range(call.visual.query.shape[2]):
        sums = block_sums(call, rows, head)
        place = _Place(rows, is_real, len(check), _of_head(centroids, head))
        found = [_outcome(corrector, sums, place, kept[:, head, None]) for kept in choices]
        each_error.append(torch.stack([error for error, _ in found], -1))
        exact.append(found[0][1])
    known = torch.cat(exact, 1).transpose(1, 2)  # (B, R, H, D)
    is_checked = is_real[..., : len(check)].transpose(1, 2)[..., None]
    norm = known.masked_fill(~is_checked, 0.0).square().sum((1, 2, 3))
    errors = torch.cat(each_error, 1).nan_to_num(nan=torch.inf)
    keep = _cheapest(errors, (max_error / SAFETY) ** 2 * norm)
    return Promise(keep, check, known, is_checked)


class _Place(NamedTuple):
    """Sampled rows of one head, `checked` of them before those that are fitted on; summaries."""

    rows: Tensor
    is_real: Tensor
    checked: int
    centroids: Centroids | None


def _choices(rows: BlockRows, parts: Parts, forced: Tensor | None) -> list[Tensor]:
    """What sampled rows keep, (B, H, R, NB) bool, for each of the shares."""
    scores = parts.scores(rows, None if forced is None else forced[rows.rows])
    found = [parts.kept_of_all(scores, Ask(share)) for share in SHARES[:-1]]
    return [*found, torch.ones_like(found[0])]


def _of_head(centroids: Centroids | None, head: int) -> Centroids | None:
    if centroids is None:
        return None
    some = slice(head, head + 1)
    key, value, log_count, variance = centroids
    variance = None if variance is None else variance[:, some]
    return Centroids(key[:, some], value[:, some], log_count[:, some], variance)


def _outcome(
    corrector: Corrector, sums: BlockSums, place: _Place, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error (B, 1) of the checked rows of one head, and their exact attention."""
    rows, is_real, checked, centroids = place
    sample = sums.sample(rows, is_real, kept, slice(0, checked))
    if isinstance(corrector, BlockSummaries) and centroids is not None:
        fit = sums.sample(rows, is_real, kept, slice(checked, None))
        output = predicted(corrector.fitted(centroids, fit), sample)
    else:
        output = sample.kept_sum / sample.kept_mass.clamp_min(1e-30)[..., None]
    error = (output - sample.exact).square().sum(-1)
    return error.masked_fill(~sample.is_real, 0.0).sum(-1), sample.exact


def _cheapest(errors: Tensor, bound: Tensor) -> Tensor:
    """Shares (B, H) with the least sum whose errors (B, H, shares) sum to at most a bound (B,)."""
    shares = errors.new_tensor(SHARES)
    scale = errors.mean((1, 2)).clamp_min(1e-30)
    prices = errors.new_tensor(_PRICES)[:, None, None, None]
    cost = shares + prices * errors / scale[:, None, None]  # (prices, B, H, shares)
    picked = cost.argmin(-1)  # (prices, B, H)
    total = errors.expand(len(prices), -1, -1, -1).gather(-1, picked[..., None]).sum((2, 3))
    spent = shares[picked].sum(-1)
    spent = spent.masked_fill(total > bound, torch.inf)
    best = spent.argmin(0)  # (B,)
    chosen = shares[picked].gather(0, best[None, :, None].expand(1, -1, errors.shape[1]))[0]
    is_possible = spent.amin(0).isfinite()
    return torch.where(is_possible[:, None], chosen, torch.ones_like(chosen))
