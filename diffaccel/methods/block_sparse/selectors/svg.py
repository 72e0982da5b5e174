"""Heads that look at their frame, and heads that look at their place in all: Sparse VideoGen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels import block_lists
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows, Chosen
from diffaccel.methods.block_sparse.budgets import Ask, Budget, PositiveBudget
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.block_sparse.sampled_rows import sampled_rows, spread_rows
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import without_empty
from diffaccel.methods.block_sparse.selectors.pattern import token_places

_SAMPLES = 8  # tokens of a block that are looked at


@dataclass(frozen=True, slots=True)
class SpatialTemporal(Selector):
    """Keeps the blocks nearest in time, or those nearest in place, whichever suits a head better.

    Both patterns are tried on some query rows whose exact attention is computed; each head takes
    the one with the smaller error of the output. "Sparse VideoGen: Accelerating Video Diffusion
    Transformers with Spatial-Temporal Sparsity" (Xi et al., 2025,
    https://arxiv.org/abs/2502.01776). There masks hold whole frames, or stripes of tokens; here
    they are the nearest blocks by the mean distance of their tokens, in frames or in positions
    along the raster of a frame, so that both have one density. In an image, all is one frame.

    Args:
        keep: Share of the key blocks, above 0 to 1: 0.3 is published for Wan at 720p, 0.25 for
            HunyuanVideo.
        rows: Query rows on which heads are judged, at least 1.
    """

    keep: float = 0.3
    rows: int = 64

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0.0 < self.keep <= 1.0 or self.rows < 1:
            raise ValueError(
                "keep must lie above 0 and be at most 1, and rows be at least 1, got "
                f"keep={self.keep}, rows={self.rows}; 0.3 and 64 are published"
            )

    @property
    def budget(self) -> Budget:
        """All of the pattern."""
        return PositiveBudget()

    def score(self, rows: BlockRows) -> Tensor:
        """Nearness within the pattern of each head."""
        call = rows.call
        spatial, temporal = _patterns(self, call.order, call.order.order.device)
        is_temporal = call.once(self, lambda: self._choose(call, spatial, temporal))
        scores = torch.where(is_temporal[..., None, None], temporal[rows.rows], spatial[rows.rows])
        return without_empty(scores, rows)

    def share(self, order: TokenOrder) -> float:
        """As asked for."""
        return Ask(self.keep).per_row(order.blocks) / order.blocks

    def _choose(self, call: BlockCall, spatial: Tensor, temporal: Tensor) -> Tensor:
        """Whether the temporal pattern errs less: (B, H) bool."""
        batch, length, heads, _ = call.visual.query.shape
        rows = spread_rows(length, self.rows, call.visual.query.device)
        errors = []
        for pattern in (spatial, temporal):
            kept = (pattern > 0).expand(batch, heads, -1, -1)
            sample = sampled_rows(Chosen(call, *block_lists(kept, call.number)), rows)
            error = sample.kept_sum / sample.kept_mass[..., None] - sample.exact
            error = error.square().sum(-1)
            errors.append(error.masked_fill(~sample.is_real, 0.0).sum(-1))
        return errors[1] < errors[0]


@lru_cache(maxsize=32)
def _patterns(
    selector: SpatialTemporal, order: TokenOrder, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Nearness of the kept blocks in time and in place, 0 for others: (NB, NB) fp32 each."""
    _, _, width = order.grid
    frame, row, column = token_places(order, _SAMPLES)
    count = Ask(selector.keep).per_row(order.blocks)
    with torch.inference_mode(False):
        spatial = _nearest(frame, count).to(device)
        temporal = _nearest(row * width + column, count).to(device)
    return spatial, temporal


def _nearest(places: Tensor, count: int) -> Tensor:
    """1 / (1 + mean distance) of the nearest blocks, of (NB, samples) places: (NB, NB)."""
    blocks, samples = places.shape
    places = places.float()
    distance = torch.zeros(blocks, blocks)
    for some in range(samples):
        for other in range(samples):
            distance += (places[:, some, None] - places[:, other]).abs()
    index = torch.arange(blocks)
    # Of equally near blocks, those that are also near in the order; the own one first.
    distance = distance / samples**2 + 1e-4 * (index[:, None] - index).abs() / blocks
    distance.fill_diagonal_(0.0)
    best = distance.topk(count, -1, largest=False).indices
    kept = torch.zeros(blocks, blocks, dtype=torch.bool).scatter_(-1, best, True)
    return (1.0 / (1.0 + distance)).masked_fill(~kept, 0.0)
