"""Context parallelism: ranks that hold a part of the tokens exchange it for a part of the heads.

diffusers splits the text of a model call and its visual tokens apart, so that a rank holds [its
text, its image]. For attention every rank gets all tokens of some heads, in the order in which one
rank has them, so that methods compute what they always do: "DeepSpeed Ulysses" (Jacobs et al.,
2023, https://arxiv.org/abs/2309.14509), where diffusers was asked for a ring as well. Its ring
gathers the keys and values of all heads on every rank; this moves and holds less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffaccel.errors import ModelError
from diffaccel.layout import TokenLayout
from diffaccel.methods.inputs import GRADIENTS_NEEDED

if TYPE_CHECKING:
    from diffaccel.attach.call import AttentionCall, Compute

Shards = tuple[tuple[int, ...], ...]
"""Tokens of each stream on each rank: [rank][stream]."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadShare:
    """The heads of a layer that one of several ranks computes, over all tokens.

    Args:
        group: The ranks.
        rank: Which of them this process is.
        heads: Heads of each rank.
        tokens: Tokens that each rank holds outside of attention.
    """

    group: Any
    rank: int
    heads: tuple[int, ...]
    tokens: Shards

    @classmethod
    def of(cls, call: AttentionCall) -> HeadShare:
        """Returns the share of a call that `why_not_exchanged` has nothing against."""
        mesh, heads = call.attached.state.context._flattened_mesh, call.query.shape[2]
        ranks, layout = mesh.size(), call.layout
        assert layout is not None
        shares = tuple(_evenly(heads, ranks))
        return cls(mesh.get_group(), mesh.get_local_rank(), shares, token_shards(layout, ranks))

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return len(self.heads)

    @property
    def first_head(self) -> int:
        """Index of the first head of this rank."""
        return sum(self.heads[: self.rank])

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Answers a call on this rank's tokens, (B, n, H, D); `compute` gets all tokens."""
        query, key, value = map(self._all_tokens, (call.query, call.key, call.value))
        mask = call.mask
        if mask is not None and mask.shape[-1] == call.query.shape[1]:
            mask = self._all_keys(mask)
        output = compute(
            replace(call, query=query, key=key, value=value, mask=mask, share=self).alone()
        )
        return self._own_tokens(output)

    def total(self, part: Tensor) -> Tensor:
        """Sums what the ranks computed for their heads, in place."""
        dist.all_reduce(part, group=self.group)
        return part

    def mean(self, density: Tensor | float, device: torch.device) -> Tensor:
        """Averages a density over all heads."""
        weight = self.heads[self.rank] / sum(self.heads)
        return self.total(torch.as_tensor(density, dtype=torch.float32, device=device) * weight)

    def _all_tokens(self, tokens: Tensor) -> Tensor:
        """Exchanges (B, n, H, D) for (B, N, h, D)."""
        batch, _, _, dim = tokens.shape
        own = self.heads[self.rank]
        received = self._exchange(
            [[part] for part in tokens.split(self.heads, 2)],
            [(batch, sum(counts), own, dim) for counts in self.tokens],
        )
        return self._in_order(received, 1)

    def _own_tokens(self, tokens: Tensor) -> Tensor:
        """Exchanges (B, N, h, D) for (B, n, H, D)."""
        batch, _, _, dim = tokens.shape
        lengths = [count for stream in zip(*self.tokens, strict=True) for count in stream]
        shards = tokens.split(lengths, 1)
        received = self._exchange(
            [list(shards[rank :: self.ranks]) for rank in range(self.ranks)],
            [(batch, sum(self.tokens[self.rank]), heads, dim) for heads in self.heads],
        )
        return torch.cat(received, 2)

    def _all_keys(self, mask: Tensor) -> Tensor:
        """Gathers a mask over this rank's keys, (..., n), to one over all, (..., N)."""
        plain = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
        rows = plain.reshape(-1, plain.shape[-1])
        received = self._exchange(
            [[rows]] * self.ranks, [(len(rows), sum(counts)) for counts in self.tokens]
        )
        return self._in_order(received, 1).reshape(*mask.shape[:-1], -1).to(mask.dtype)

    def _in_order(self, received: Sequence[Tensor], dim: int) -> Tensor:
        """Joins what the ranks hold, [text, image] each, to the sequence of one rank."""
        parts = [x.split(counts, dim) for x, counts in zip(received, self.tokens, strict=True)]
        return torch.cat([shard for stream in zip(*parts, strict=True) for shard in stream], dim)

    def _exchange(
        self, parts: Sequence[list[Tensor]], shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Sends each rank its parts, joined along axis 1, and returns what came from each."""
        sizes = [sum(x.numel() for x in some) for some in parts]
        like = parts[0][0]
        sent = like.new_empty(sum(sizes))
        for some, buffer in zip(parts, sent.split(sizes), strict=True):
            length = sum(x.shape[1] for x in some)
            shape = (some[0].shape[0], length, *some[0].shape[2:])
            torch.cat(some, 1, out=buffer.view(shape))
        counts = [torch.Size(shape).numel() for shape in shapes]
        received = like.new_empty(sum(counts))
        dist.all_to_all_single(received, sent, counts, sizes, group=self.group)
        views = zip(received.split(counts), shapes, strict=True)
        return [part.view(shape) for part, shape in views]


def attend_in_parallel(call: AttentionCall, compute: Compute) -> Tensor:
    """Answers a call of a model whose tokens are split among ranks.

    Raises:
        ModelError: Nobody can compute it: not with heads exchanged, nor does diffusers.
    """
    if call.layer.kind == "cross" or call.is_cross_attention:
        return compute(call)
    if holds_all(call):
        return compute(call.alone())
    reason = why_not_exchanged(call)
    if not reason:
        return HeadShare.of(call).attend(call, compute)
    if not (call.dispatch and call.dispatch.get("parallel_config")):
        # diffusers would attend within the shard of each rank, and not say so.
        raise ModelError(
            f"attention of {call.layer.name} needs the tokens of all ranks, and {reason}; split "
            "text and visual tokens along their sequence by the cp_plan, or do without "
            "enable_parallelism"
        )
    return compute(call)


def why_not_exchanged(call: AttentionCall) -> str:
    """Returns why the tokens of a call cannot be exchanged for heads, "" where they can."""
    mesh = call.attached.state.context._flattened_mesh
    ranks, rank, layout = mesh.size(), mesh.get_local_rank(), call.layout
    _, length, heads, _ = call.query.shape
    if call.needs_gradients:
        return GRADIENTS_NEEDED
    if layout is None:
        return call.attached.state.why_no_layout(call.layer)
    if length != sum(token_shards(layout, ranks)[rank]):
        return (
            f"the layer got {length} tokens on rank {rank} of {ranks}, which is no even share of "
            f"each stream of the {layout.length} tokens of the model call"
        )
    if call.options or heads != call.key.shape[2]:
        return "dropout, causal masks and grouped heads are not supported"
    if heads < ranks:
        return f"{heads} heads cannot be shared by {ranks} ranks"
    if call.mask is not None and call.mask.ndim > 1 and call.mask.shape[-2] == length:
        return f"an attention mask of shape {tuple(call.mask.shape)} is not key padding"
    return ""


def holds_all(call: AttentionCall) -> bool:
    """Whether this rank has all tokens of the call, as outside of the blocks that are split."""
    layout = call.layout
    return layout is not None and layout.length == call.query.shape[1]


@lru_cache(maxsize=64)
def token_shards(layout: TokenLayout, ranks: int) -> Shards:
    """Returns how many tokens of each stream every rank holds.

    Text is one tensor, visual and condition tokens side by side are another. diffusers splits
    each for itself; where that does not come out even, the first ranks have one token more.
    """
    runs = groupby(layout.segments, lambda part: part.kind == "text")
    lengths = [sum(part.length for part in run) for _, run in runs]
    return tuple(zip(*(_evenly(length, ranks) for length in lengths), strict=True))


def _evenly(number: int, ranks: int) -> list[int]:
    return [number // ranks + (rank < number % ranks) for rank in range(ranks)]
