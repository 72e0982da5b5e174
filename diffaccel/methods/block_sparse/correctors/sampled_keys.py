"""Left-out blocks as one of their own keys: the residual of HyperAttention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels import Centroids
from diffaccel.methods.block_sparse.block_call import Chosen
from diffaccel.methods.block_sparse.correctors.base import Corrector, Summary
from diffaccel.methods.block_sparse.representatives import at_tokens, representatives


@dataclass(frozen=True, slots=True)
class SampledKeys(Corrector):
    """Lets one key of each left-out block, drawn at random, stand for all n of them.

    Its score gets + log n, so that the normaliser is right on average over the draws. The sampled
    residual of "HyperAttention: Long-context Attention in Near-Linear Time" (Han et al., 2023,
    https://arxiv.org/abs/2310.05869), drawn evenly over the sequence rather than from all keys at
    once. Exact where the keys and values of a block are all equal.

    Args:
        seed: Of the draw, which is the same in every call.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)

    def added_cost(self, length: int, block: int) -> float:
        """Scores and values of the drawn keys."""
        return 1.0 / block

    def summarise(self, chosen: Chosen) -> Summary:
        """One key and its value per block."""
        call = chosen.call
        statistics = call.statistics
        place = _places(call.number, self.seed, statistics.key_mean.device)
        drawn = representatives(call, call.block, place)
        key, value = (at_tokens(x, drawn) for x in (call.visual.key, call.visual.value))
        is_empty = statistics.counts == 0  # whatever was drawn there may hold NaN
        if call.visual.valid is not None:
            key, value = (x.masked_fill(is_empty[:, None, :, None], 0.0) for x in (key, value))
        log_count = statistics.counts.log()[:, None].expand(*key.shape[:3])
        return Summary(Centroids(key, value, log_count))


@lru_cache(maxsize=16)
def _places(number: int, seed: int, device: torch.device) -> Tensor:
    """Random numbers (number,) fp32, drawn once: a copy to a device would wait."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(number, generator=generator).to(device)
