"""Blocks whose tokens are hashed to the same buckets: HyperAttention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows
from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.logits import LEAST, without_empty


@dataclass(frozen=True, slots=True)
class HashedBuckets(Selector):
    """Scores a block by how many of its keys share a bucket with queries of the query block.

    Tokens are hashed by the signs of `projections` random products; codes that differ in one sign
    are neighbours (Gray code). Queries and keys are sorted by their code and cut into buckets of
    `bucket` keys, and

        score_nm = sum over buckets of (queries of block n in it) * (keys of block m in it)

    "HyperAttention: Long-context Attention in Near-Linear Time" (Han et al., 2023,
    https://arxiv.org/abs/2310.05869) attends within buckets, which leaves no blocks of the grid;
    here the blocks with the most such pairs are computed whole. Its sample of the other keys is
    the corrector `SampledKeys`.

    Args:
        projections: Signs of a code, 1 to 16: 7 as published.
        bucket: Keys per bucket, at least 1: 256 as published.
        seed: Of the random directions.
    """

    projections: int = 7
    bucket: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 1 <= self.projections <= 16 or self.bucket < 1:
            raise ValueError(
                "projections must lie in 1 to 16 and bucket be at least 1, got "
                f"projections={self.projections}, bucket={self.bucket}; 7 and 256 are published"
            )

    def score(self, rows: BlockRows) -> Tensor:
        """Pairs of a query and a key in one bucket; those of blocks without any are hardly 0."""
        call = rows.call
        queries, keys = call.once(self, lambda: self._histograms(call))
        scores = (queries[:, :, rows.rows] @ keys.mT).clamp_(min=LEAST)
        is_finite = call.statistics.key_mean.isfinite().all(-1)[:, :, None]
        return without_empty(scores.masked_fill_(~is_finite, torch.nan), rows)

    def _histograms(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """How many tokens of each block fall in each bucket: (B, H, NB, buckets), twice."""
        visual = call.visual
        channels, device = visual.query.shape[-1], visual.query.device
        directions = _directions(channels, self.projections, self.seed, device)
        number = max(1, visual.key.shape[1] // self.bucket)
        found = []
        for tokens in (visual.query, visual.key):
            codes = _gray_ranks(tokens.float() @ directions > 0).transpose(1, 2)  # (B, H, N)
            real = torch.ones_like(codes, dtype=torch.bool)
            if visual.valid is not None:
                real = visual.valid[:, None].expand_as(codes)
                codes = codes.masked_fill(~real, 1 << self.projections)  # padded ones come last
            rank = codes.argsort(dim=-1, stable=True).argsort(dim=-1)
            count = real.sum(-1, keepdim=True).clamp_min(1)
            bucket = (rank * number // count).clamp_(max=number - 1)
            block = torch.arange(codes.shape[-1], device=device) // call.block
            histogram = torch.zeros(*codes.shape[:2], call.number * number, device=device)
            histogram.scatter_add_(-1, block * number + bucket, real.float())
            found.append(histogram.unflatten(-1, (call.number, number)))
        return found[0], found[1]


@lru_cache(maxsize=16)
def _directions(channels: int, number: int, seed: int, device: torch.device) -> Tensor:
    """Random directions (channels, number) fp32, drawn once: a copy to a device would wait."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(channels, number, generator=generator).to(device)


def _gray_ranks(signs: Tensor) -> Tensor:
    """Ranks of codes (..., r) bool in an order in which neighbours differ in one sign: (...)."""
    code = torch.zeros(signs.shape[:-1], dtype=torch.int64, device=signs.device)
    parity = torch.zeros_like(code)
    for bit in signs.unbind(-1):
        parity = parity ^ bit
        code = code * 2 + parity
    return code
