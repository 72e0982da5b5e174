"""Selectors: which key blocks a query block computes exactly."""

from diffaccel.methods.block_sparse.selectors.base import Selector
from diffaccel.methods.block_sparse.selectors.expected_error import ExpectedError
from diffaccel.methods.block_sparse.selectors.pooled import PooledAttention

SELECTORS: dict[str, type[Selector]] = {
    "expected-error": ExpectedError,
    "pooled": PooledAttention,
}
"""Name -> class, for knobs that are text."""

__all__ = ["SELECTORS", "ExpectedError", "PooledAttention", "Selector"]
