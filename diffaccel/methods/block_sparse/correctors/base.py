"""What every corrector is: an answer for the key blocks that a selector left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffaccel.kernels import Centroids
from diffaccel.methods.block_sparse.block_call import BlockRows, Chosen
from diffaccel.methods.block_sparse.sampled_rows import SampledRows


class KernelOutput(NamedTuple):
    """What the kernel made of the chosen blocks.

    Args:
        output: (B, N, H, D), in block order.
        lse: (B, N, H) fp32, natural-log normaliser, size 0 unless the corrector needs it.
        tail: (B, N, H) fp32, share of the softmax that went to summaries, likewise.
    """

    output: Tensor
    lse: Tensor
    tail: Tensor


class Summary(NamedTuple):
    """What stands for the left-out blocks.

    Args:
        centroids: One key and value per block, in the softmax of every row that leaves it out.
        sample: Rows whose exact attention is known, for what `finish` fits; None for nothing.
    """

    centroids: Centroids
    sample: SampledRows | None = None


@dataclass(frozen=True, slots=True)
class Corrector:
    """Does nothing, the base of all: what it may do stands in the order in which it is asked.

    A softmax over kept blocks alone gives them all of the attention, although they own a part of
    it, and gives the others nothing. A corrector answers with two numbers per query block, which
    the attention kernel applies to each of its rows (`output = row_scale * exact + row_bias`),
    with one summary per key block, which the kernel puts into the softmax of every row that
    leaves the block out, or with what it adds to the output afterwards.
    """

    needs_lse: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Statistics beside the means of query and key, as `StatisticsCall.needs` names them."""
        return frozenset()

    @property
    def needs_tail(self) -> bool:
        """Whether `finish` uses the share of the softmax that went to summaries."""
        return False

    def added_cost(self, length: int, block: int) -> float:
        """Multiply-adds that it adds, in terms of dense attention, for heads of 128.

        Args:
            length: Visual tokens N.
            block: Tokens per block.
        """
        return 0.0

    def correct(self, rows: BlockRows, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """Computes what is applied to every row of some query blocks, or None for nothing.

        Args:
            rows: The query blocks.
            kept: (B, H, R, NB) bool, which key blocks they compute.

        Returns:
            row_scale (B, H, R) fp32 in 0..1, and row_bias (B, H, R, D) fp32.
        """
        return None

    def summarise(self, chosen: Chosen) -> Summary | None:
        """Summarises the key blocks for the softmax of each row, or None for nothing."""
        return None

    def finish(self, chosen: Chosen, summary: Summary | None, attended: KernelOutput) -> Tensor:
        """Changes the output of the kernel, in place or not: (B, N, H, D)."""
        return attended.output


@dataclass(frozen=True, slots=True)
class NoCorrection(Corrector):
    """Left-out blocks count as if they did not exist."""
