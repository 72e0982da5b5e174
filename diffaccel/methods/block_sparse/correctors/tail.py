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

    All rows of a query block share the scores against keys less the mean of all block means, and
    with them one summary of everything that the block leaves out, which joins their softmax; what
    that mean itself scores is added row by row, so that one vector added to all keys changes
    nothing. The correction of "Sol-Attn" (2026,
    https://arxiv.org/abs/2607.24027). Exact where the tokens of a block are all alike, queries,
    keys and values.
    """

    needs_lse: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """The mean values."""
        return frozenset({"value_mean"})

    def finish(self, chosen: Chosen, summary: Summary | None, attended: KernelOutput) -> Tensor:
        """Merges the summary of each query block into the rows of it."""
        call, output = chosen.call, attended.output
        statistics = call.statistics
        blocks = (statistics.counts > 0).sum(-1).clamp_min(1)[:, None, None, None]
        centre = statistics.key_mean.sum(2, keepdim=True) / blocks  # empty blocks have 0
        for rows in call.rows():
            query = rows.query_mean * call.visual.scale
            logits = query @ (statistics.key_mean - centre).mT
            logits += statistics.counts.log()[:, None, None]
            logits = logits.masked_fill(chosen.kept(rows.rows), -torch.inf)
            mass = logits.logsumexp(-1, keepdim=True)
            weights = (logits - mass).exp().masked_fill(mass == -torch.inf, 0.0)
            value = weights @ statistics.value_mean
            part: Any = rows.rows
            place = slice(part.start * call.block, part.stop * call.block)
            length = output[:, place].shape[1]
            mass, value = (
                x.repeat_interleave(call.block, 2)[:, :, :length].transpose(1, 2)
                for x in (mass, value)
            )
            of_row = call.visual.query[:, place].float() * centre.transpose(1, 2)
            mass = mass + call.visual.scale * of_row.sum(-1, keepdim=True)
            share = (mass - attended.lse[:, place, :, None]).sigmoid()
            share = share.masked_fill(mass == -torch.inf, 0.0)
            mixed = output[:, place].float().lerp(value, share)
            output[:, place] = mixed.to(output.dtype)
        return output
