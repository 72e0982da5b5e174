"""The order of tokens that suits a layer best, found by what it does to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.order import token_order
from diffaccel.methods.block_sparse.sampled_rows import spread_rows
from diffaccel.methods.inputs import AttentionInputs
from diffaccel.methods.visual import Exactness

AUTO = "auto"
CANDIDATES = ("raster", "brick")
"""Orders that are tried; the first is taken where nothing is remembered, and in ties."""

TRIED_FROM = 0.2
"""Share of the schedule from which orders are tried: before, noise hardly prefers any."""

ROWS = 64
_OFFSET = 0.25  # correctors are fitted to rows with another one


def attend_in_best_order(
    attend: Callable[[str, Tensor, dict[str, Any]], Exactness],
    inputs: AttentionInputs,
    block: int,
    out: Tensor,
    remembered: dict[str, Any],
) -> tuple[str, Exactness]:
    """Attends in each order of `CANDIDATES`, and keeps that whose output errs less.

    The error is that of `ROWS` query rows of every head, spread over the picture, whose attention
    is computed exactly. Waits for the device.

    Args:
        attend: Attends in an order, writes visual rows (B, N, H, D), notes what is to be
            remembered, and says how exact it is.
        inputs: The whole call.
        block: Tokens per block.
        out: (B, N, H, D), the visual rows of the output, which are to be written.
        remembered: Gets what the best order leaves to be remembered.

    Returns:
        The name of the order, and how exact it is.
    """
    first, *others = CANDIDATES
    notes: dict[str, Any] = {}
    best, exactness = first, attend(first, out, notes)
    grid = inputs.layout.grid
    taken = token_order(grid, first, block).order
    others = [name for name in others if not taken.equal(token_order(grid, name, block).order)]
    if others:
        visual = inputs.visual()
        rows = spread_rows(visual.query.shape[1], ROWS, out.device, _OFFSET)
        exact = inputs.dense_rows(rows + inputs.layout.visual_slice.start).float()
        valid = None if visual.valid is None else visual.valid[:, rows, None, None]
        error = _error(out[:, rows], exact, valid)
        for name in others:
            trial, trial_notes = torch.empty_like(out), dict[str, Any]()
            trial_exactness = attend(name, trial, trial_notes)
            trial_error = _error(trial[:, rows], exact, valid)
            if trial_error < error:
                out.copy_(trial)
                best, exactness = name, trial_exactness
                notes, error = trial_notes, trial_error
    remembered.update(notes)
    return best, exactness


def _error(output: Tensor, exact: Tensor, valid: Tensor | None) -> float:
    """Sum of squares, over the rows that are no padding."""
    error = (output.float() - exact).square_()
    return float((error if valid is None else error.masked_fill_(~valid, 0.0)).sum())
