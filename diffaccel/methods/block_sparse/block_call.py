"""One call in blocks: what selectors and correctors see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from diffaccel.kernels import BlockStatistics, listed_blocks
from diffaccel.methods.block_sparse.estimator import block_attention, row_steps
from diffaccel.methods.block_sparse.order import TokenOrder
from diffaccel.methods.inputs import ExactTokens, Position, VisualTokens


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """The visual tokens of a call in block order, and what is known about their blocks.

    Args:
        visual: The visual tokens, in block order.
        exact: What every query sees exactly.
        order: Which tokens form a block.
        statistics: Of the NB blocks; those that selector and corrector need.
        position: Where in a model and a run the call stands.
    """

    visual: VisualTokens
    exact: ExactTokens
    order: TokenOrder
    statistics: BlockStatistics
    position: Position
    _found: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: object, find: Callable[[], Any]) -> Any:
        """Finds something out about the whole call, the first time that somebody asks for it."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    @property
    def block(self) -> int:
        """Tokens per block; the last one may have fewer."""
        return self.order.block

    @property
    def number(self) -> int:
        """Number of blocks NB."""
        return self.order.blocks

    def rows(self) -> list[BlockRows]:
        """Splits the query blocks into runs that bound the memory."""
        steps = row_steps(self.statistics, self.exact.key.shape[1])
        return [BlockRows(self, rows) for rows in steps]


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Some query blocks of a call, R of them, against all key blocks.

    Args:
        call: The whole call.
        rows: Which query blocks: a slice, or their numbers (R,) int64, which may repeat.
    """

    call: BlockCall
    rows: slice | Tensor

    @cached_property
    def probability(self) -> Tensor:
        """The predicted attention: (B, H, R, NB + 1) fp32, rows sum to 1, the last is all text."""
        call = self.call
        return block_attention(call.statistics, call.exact, call.visual.scale, self.rows)

    @property
    def query_mean(self) -> Tensor:
        """Mean queries of these blocks, (B, H, R, D) fp32, unscaled."""
        return self.call.statistics.query_mean[:, :, self.rows]


class Chosen(NamedTuple):
    """A call, and which key blocks each query block computes exactly.

    Args:
        call: The call.
        indices: (B, H, NB, max_count) int32, as `block_sparse_attention` takes them.
        counts: (B, H, NB) int32.
        fitted: What a corrector fits to sampled rows of the call goes here, to be remembered;
            what is here already was fitted in an earlier step, together with the lists. None
            where nothing is remembered.
    """

    call: BlockCall
    indices: Tensor
    counts: Tensor
    fitted: dict[str, Tensor] | None = None

    def kept(self, rows: slice | Tensor) -> Tensor:
        """Which blocks are computed, of some query blocks: (B, H, R, NB) bool."""
        return listed_blocks(self.indices[:, :, rows], self.counts[:, :, rows], self.call.number)
