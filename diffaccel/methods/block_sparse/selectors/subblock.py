"""The blocks with the largest attention between means of parts of blocks: SubBlock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels import BlockStatistics, StatisticsCall
from diffaccel.kernels.block_statistics.op import summarise
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.estimator import block_logits
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import softmax_scores

Join = Literal["log-sum-exp", "max"]


@dataclass(frozen=True, slots=True)
class SubBlocks(Selector):
    """Scores a block by the attention between the means of its parts and those of the query block.

    With mean queries q_a and mean keys k_b of n_b tokens, of runs of tokens within the blocks,

        L_nm = log sum_ab exp(s * q_a . k_b + log n_b)        score_nm = softmax of L over m

    the mass that the tile would have. Rows are not normalised before they are joined: that lost
    in the experiments of the source, "SubBlock", the key-split router of SGLang's diffusion
    backend (https://github.com/sgl-project/sglang).

    Args:
        query_parts: Parts of a query block, a power of two up to the block: 4.
        key_parts: Parts of a key block, likewise: 4. With 1 and 1 this is the attention of block
            means, with parts of one token the exact mass.
        join: "log-sum-exp", or "max" for the largest logit of any two parts.
    """

    query_parts: int = 4
    key_parts: int = 4
    join: Join = "log-sum-exp"

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("query_parts", "key_parts"):
            parts = getattr(self, name)
            if parts < 1 or parts & (parts - 1):
                raise ValueError(
                    f"{name} must be a power of two of at least 1, got {name}={parts}; 4 is usual"
                )
        if self.join not in get_args(Join):
            raise ValueError(
                f"join must be one of {', '.join(get_args(Join))}, got join={self.join!r}"
            )

    def score(self, rows: BlockRows) -> Tensor:
        """The predicted mass of each tile, as a share of its row."""
        call = rows.call
        parts = call.once((self, "query"), lambda: _parts(call, self.query_parts))
        query = _split(parts.query_mean, call, self.query_parts)[:, :, rows.rows]
        has_query = _split(parts.counts[:, None, :, None], call, self.query_parts)[:, :, rows.rows]
        query = query * call.visual.scale
        keys = call.once((self, "key"), lambda: _key_parts(call, self.key_parts))
        pairs = (
            block_logits(part, query[:, :, :, some]).masked_fill_(
                has_query[:, :, :, some] == 0, -torch.inf
            )
            for part in keys
            for some in range(query.shape[3])
        )
        joined = reduce(torch.maximum if self.join == "max" else torch.logaddexp, pairs)
        return softmax_scores(joined, rows)


def _parts(call: BlockCall, parts: int) -> BlockStatistics:
    visual, size = call.visual, max(1, call.block // parts)
    return summarise(
        StatisticsCall(
            visual.query, visual.key, visual.value, size, visual.valid, needs=frozenset()
        )
    )


def _split(means: Tensor, call: BlockCall, parts: int) -> Tensor:
    """(B, H, parts of all blocks, D) to (B, H, NB, parts, D), zeros where the last lacks some."""
    parts = min(parts, call.block)
    missing = call.number * parts - means.shape[2]
    if missing:
        means = torch.nn.functional.pad(means, (0, 0, 0, missing))
    return means.unflatten(2, (call.number, parts))


def _key_parts(call: BlockCall, count: int) -> list[BlockStatistics]:
    """Mean keys and counts of the first part of all blocks, of the second, and so on."""
    parts = _parts(call, count)
    keys = _split(parts.key_mean, call, count)
    counts = _split(parts.counts[:, None, :, None], call, count)[:, 0, :, :, 0]
    return [
        replace(parts, key_mean=keys[:, :, :, part], counts=counts[:, :, part])
        for part in range(keys.shape[3])
    ]
