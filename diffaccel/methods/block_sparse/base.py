"""The attention that all block-sparse methods share: order, estimate, select, correct, attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffaccel.kernels import Centroids, block_sparse_attention, dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import DenseLayers, Method, check_schedule
from diffaccel.methods.block_sparse.correctors import NoCorrection, Selected
from diffaccel.methods.block_sparse.estimator import (
    BlockStatistics,
    block_attention,
    block_statistics,
    row_steps,
)
from diffaccel.methods.block_sparse.order import ORDERS, TokenOrder, token_order
from diffaccel.methods.block_sparse.selectors import ForcedBlocks, TopBlocks, forced_blocks
from diffaccel.methods.exact_tokens import OtherKeys, other_keys, other_rows, total_density

KEPT_RATE = {"cpu": 0.65, "cuda": 0.75}
"""FLOP rate on kept blocks of 128 in terms of dense attention. The CPU's is measured at 16k
tokens (2 AVX2 cores, fp32); the GPU's is what published kernels reach, not measured here."""


class SharedKnobs(Protocol):
    """The fields that every block-sparse method has."""

    p_remain: float
    block: int
    order: str
    neighbors: bool
    first_frame: bool | None
    dense_steps: int | None
    dense_layers: DenseLayers


class BlockPlan(NamedTuple):
    """What the kernel is told: block lists, and the correction of the blocks left out."""

    indices: Tensor
    counts: Tensor
    row_scale: Tensor | None
    row_bias: Tensor | None
    centroids: Centroids | None = None


@dataclass(frozen=True, slots=True)
class BlockSparseMethod(Method):
    """A selector and a corrector over blocks of visual tokens; text is always exact.

    Visual queries attend to the selected visual blocks and to all text and condition tokens.
    Text and condition queries run dense over everything. A subclass has the fields of
    `SharedKnobs` and says what its selector and its corrector are.
    """

    def selector(self) -> TopBlocks:
        """Which key blocks are computed exactly."""
        raise NotImplementedError(f"{type(self).__name__} does not implement selector")

    def corrector(self) -> NoCorrection:
        """What is done about the others."""
        raise NotImplementedError(f"{type(self).__name__} does not implement corrector")

    def keeps_everything(self, layout: TokenLayout) -> bool:
        """Whether nothing would be left out, so that dense attention does the same faster."""
        if layout.visual is None:
            return True
        blocks = -(-layout.visual.length // self.block)
        if self.selector().top_k(blocks) == blocks:
            return True
        return self._forced(layout, torch.device("cpu")).is_everything

    def expected_cost(self, layout: TokenLayout, device: str) -> float | None:
        """Kept blocks over the rate on them; a floor on the kept mass may keep more."""
        if self.keeps_everything(layout):
            return None
        return self.expected_density(layout) / KEPT_RATE.get(device, KEPT_RATE["cpu"])

    def expected_density(self, layout: TokenLayout) -> float | None:
        """Blocks that are asked for or forced; a floor on the kept mass may keep more."""
        if self.keeps_everything(layout):
            return 1.0
        blocks = -(-layout.visual.length // self.block)
        forced = self._forced(layout, torch.device("cpu")).share
        selected = self.selector().top_k(blocks) / blocks
        kept = 1.0 - (1.0 - selected) * (1.0 - forced)
        return total_density(kept, layout)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        layer: int | None,
    ) -> tuple[Tensor, Tensor | float]:
        if self.keeps_everything(layout):
            dense = dense_attention(
                query, key, value, scale=scale, key_padding_mask=key_padding_mask
            )
            return dense, 1.0
        output = other_rows(query, key, value, layout, scale, key_padding_mask)
        counts = self._attend_visual(query, key, value, layout, scale, key_padding_mask, output)
        blocks = -(-layout.visual.length // self.block)
        return output, total_density(counts.float().mean() / blocks, layout)

    def _attend_visual(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None,
        key_padding_mask: Tensor | None,
        output: Tensor,
    ) -> Tensor:
        """Writes the visual rows of `output` and returns the block counts (B, H, NB)."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        visual = layout.visual_slice
        order = token_order(layout.grid, self.order, self.block).to(query.device)
        others = other_keys(key, value, key_padding_mask, layout)
        query, key, value = (into_order(x[:, visual], order) for x in (query, key, value))
        valid = None
        if key_padding_mask is not None:
            valid = key_padding_mask[:, visual].index_select(1, order.order)
        with torch.autocast(query.device.type, enabled=False):  # the estimate stays fp32
            plan = self._plan(query, key, value, valid, others, scale, layout)
        result = block_sparse_attention(
            query,
            key,
            value,
            plan.indices,
            plan.counts,
            block_q=self.block,
            block_k=self.block,
            scale=scale,
            key_padding_mask=valid,
            extra_key=others.key if layout.other_slices else None,
            extra_value=others.value if layout.other_slices else None,
            extra_padding_mask=others.valid if layout.other_slices else None,
            row_scale=plan.row_scale,
            row_bias=plan.row_bias,
            centroids=plan.centroids,
        )
        output[:, visual].index_copy_(1, order.order, result)
        return plan.counts

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        others: OtherKeys,
        scale: float,
        layout: TokenLayout,
    ) -> BlockPlan:
        """Selects and corrects, some query blocks at a time to bound the memory."""
        corrector = self.corrector()
        statistics = block_statistics(
            query,
            key,
            value,
            self.block,
            valid,
            needs_value=corrector.needs_value,
            needs_spread=corrector.needs_spread,
            needs_variance=corrector.needs_variance,
        )
        forced = self._forced(layout, query.device)
        parts = [
            self._plan_rows(statistics, others, scale, forced, rows)
            for rows in row_steps(statistics, others.key.shape[1])
        ]
        plan = BlockPlan(*map(_join_rows, zip(*parts, strict=True)))
        selected = Selected(
            query, key, valid, *others[::2], plan.indices, plan.counts, self.block, scale
        )
        return plan._replace(centroids=corrector.centroids(statistics, selected))

    def _plan_rows(
        self,
        statistics: BlockStatistics,
        others: OtherKeys,
        scale: float,
        forced: ForcedBlocks,
        rows: slice,
    ) -> BlockPlan:
        selector = self.selector()
        probability = block_attention(statistics, others.key, others.valid, scale, rows)
        indices, counts, kept = selector.lists(
            probability,
            None if forced.mask is None else forced.mask[rows],
            selector.max_count(statistics.blocks, forced.largest),
        )
        correction = self.corrector().correct(statistics, probability, kept, rows)
        return BlockPlan(indices, counts, *(correction or (None, None)))

    def _forced(self, layout: TokenLayout, device: torch.device) -> ForcedBlocks:
        return forced_blocks(
            layout.grid,
            self.order,
            self.block,
            self.neighbors,
            bool(self.first_frame),
            device,
        )


def into_order(tokens: Tensor, order: TokenOrder) -> Tensor:
    """Copies (B, N, H, D) tokens from raster order into block order, contiguous."""
    if order.name == "raster":
        return tokens
    # Scattering rows into fresh memory is faster on a CPU than gathering them.
    ordered = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    return ordered.index_copy_(1, order.inverse, tokens)


def check_knobs(method: SharedKnobs) -> None:
    """Raises ValueError unless the shared knobs of a block-sparse method are in range."""
    if not 0.0 <= method.p_remain <= 1.0:
        raise ValueError(
            f"p_remain must lie in 0 to 1, got p_remain={method.p_remain}; it is the share of "
            "the attention mass that is computed exactly at least, 0 to switch it off"
        )
    block = method.block
    if not isinstance(block, int) or block < 16 or block & (block - 1):
        raise ValueError(
            f"block must be a power of two of at least 16, got {block=}; 128 suits most GPUs"
        )
    if method.order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got order={method.order!r}")
    if method.first_frame not in (None, True, False):
        raise ValueError(
            f"first_frame must be None, True or False, got first_frame={method.first_frame!r}"
        )
    check_schedule(method.dense_steps, method.dense_layers)


def _join_rows(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return torch.cat(parts, 2)
