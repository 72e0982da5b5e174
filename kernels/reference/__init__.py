"""Dense fp64 oracles, each written from its definition: other algorithms than the fast paths."""

from diffaccel.kernels.reference.attention import attention, merge_attention
from diffaccel.kernels.reference.blocks import (
    block_mask,
    block_sparse_attention,
    block_statistics,
    centroid_attention,
    select_blocks,
)
from diffaccel.kernels.reference.groups import agent_attention, merged_attention
from diffaccel.kernels.reference.neighborhood import neighborhood_attention, neighborhood_mask

__all__ = [
    "agent_attention",
    "attention",
    "block_mask",
    "block_sparse_attention",
    "block_statistics",
    "centroid_attention",
    "merge_attention",
    "merged_attention",
    "neighborhood_attention",
    "neighborhood_mask",
    "select_blocks",
]
