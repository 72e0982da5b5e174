"""Attention ops: tensors in, tensors out."""

from diffaccel.kernels.block_sparse import block_sparse_attention
from diffaccel.kernels.centroids import Centroids
from diffaccel.kernels.dense import dense_attention
from diffaccel.kernels.merge import merge_attention
from diffaccel.kernels.neighborhood import neighborhood_attention

__all__ = [
    "Centroids",
    "block_sparse_attention",
    "dense_attention",
    "merge_attention",
    "neighborhood_attention",
]
