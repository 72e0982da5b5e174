"""Left-out blocks as one summary per query block: the tail of Sol-Attn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.methods.block_sparse.block_call import Chosen
from diffaccel.methods.block_sparse.correctors.base import Corrector, KernelOutput, Summary


@dataclass(frozen=True, slots=True)
class BlockTail(Corrector):
    """Lets every left-out block enter the softmax as its mean, scored by the mean query.

    All rows of a query block share the scores, and with them one summary of everything that the
    block leaves out, which joins their softmax. What the query of a row scores with the mean of
    all keys stays its own: keys are centred, which attention itself does not notice. The
    correction of "Sol-Attn" (2026, https://arxiv.org/abs/2607.24027). Exact where the tokens of a
    block are all alike, queries, keys and values.
    """

    needs_lse: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """The mean values."""
        return frozenset({"value_mean"})

    def added_cost(self, length: int, block: int) -> float:
        """Weights times mean values, block by block."""
        return 1.0 / block**2

    def finish(self, chosen: Chosen, summary: Summary | None, attended: KernelOutput) -> Tensor:
        """Merges the summary of each query block into the rows of it."""
        call, output = chosen.call, attended.output
        statistics = call.statistics
        is_block = (statistics.counts > 0)[:, None, :, None]
        center = statistics.key_mean.masked_fill(~is_block, 0.0).sum(2, keepdim=True)
        center = center / is_block.sum(2, keepdim=True).clamp_min(1) * call.visual.scale
        for rows in call.rows():
            query = rows.query_mean * call.visual.scale
            logits = query @ statistics.key_mean.mT + statistics.counts.log()[:, None, None]
            logits = logits.masked_fill(chosen.kept(rows.rows), -torch.inf)
            mass = logits.logsumexp(-1, keepdim=True)
            weights = (logits - mass).exp().masked_fill(mass == -torch.inf, 0.0)
            value = weights @ statistics.value_mean
            mass = mass - rows.query_mean @ center.mT
            part: Any = rows.rows
            place = slice(part.start * call.block, part.stop * call.block)
            length = output[:, place].shape[1]
            mass, value = (
                x.repeat_interleave(call.block, 2)[:, :, :length].transpose(1, 2)
                for x in (mass, value)
            )
            own = call.visual.query[:, place].float() * center.transpose(1, 2)
            own = own.sum(-1, keepdim=True) - attended.lse[:, place, :, None]
            share = (mass + own).sigmoid().masked_fill(mass == -torch.inf, 0.0)
            mixed = output[:, place].float().lerp(value, share)
            output[:, place] = mixed.to(output.dtype)
        return output
