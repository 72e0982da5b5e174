"""Correctors: what is done about the key blocks that a selector left out."""

from diffaccel.methods.block_sparse.correctors.base import Corrector, NoCorrection
from diffaccel.methods.block_sparse.correctors.pooled import PooledReallocation
from diffaccel.methods.block_sparse.correctors.sampled_keys import SampledKeys
from diffaccel.methods.block_sparse.correctors.summaries import BlockSummaries
from diffaccel.methods.block_sparse.correctors.tail import BlockTail

CORRECTORS: dict[str, Corrector] = {
    "none": NoCorrection(),
    "pooled": PooledReallocation(),
    "pooled-all": PooledReallocation(gapr=False),
    "tail": BlockTail(),
    "sampled": SampledKeys(),
    "means": BlockSummaries(variance=False, fit="none", value_term=False),
    "variance": BlockSummaries(fit="none", value_term=False),
    "normaliser": BlockSummaries(fit="normaliser", value_term=False),
    "output": BlockSummaries(value_term=False),
    "value": BlockSummaries(),
}
"""Name -> corrector, for knobs that are text."""

__all__ = [
    "CORRECTORS",
    "BlockSummaries",
    "BlockTail",
    "Corrector",
    "NoCorrection",
    "PooledReallocation",
    "SampledKeys",
]
