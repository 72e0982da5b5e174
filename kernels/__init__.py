"""Attention ops: tensors in, tensors out."""

# Python that runs in a clone's root sees this folder as `kernels` too. transformers looks for a
# package of that name and imports it, which must then neither work nor fail.
if __name__ == "kernels":
    __version__ = "0"
else:
    from diffaccel.kernels.block_selection.call import SelectionCall
    from diffaccel.kernels.block_selection.cpu import block_lists
    from diffaccel.kernels.block_selection.op import select_blocks
    from diffaccel.kernels.block_sparse.call import BlockSparseCall
    from diffaccel.kernels.block_sparse.op import block_sparse_attention
    from diffaccel.kernels.block_statistics.call import BlockStatistics, StatisticsCall
    from diffaccel.kernels.block_statistics.op import block_statistics
    from diffaccel.kernels.centroids import Centroids, listed_blocks
    from diffaccel.kernels.dense import dense_attention
    from diffaccel.kernels.merge import merge_attention
    from diffaccel.kernels.neighborhood.call import NeighborhoodCall
    from diffaccel.kernels.neighborhood.op import neighborhood_attention, visited_share
    from diffaccel.kernels.neighborhood.windows import Axis as WindowAxis
    from diffaccel.kernels.neighborhood.windows import gathered_share, seen_share

__all__ = [
    "BlockSparseCall",
    "BlockStatistics",
    "Centroids",
    "NeighborhoodCall",
    "SelectionCall",
    "StatisticsCall",
    "WindowAxis",
    "block_lists",
    "block_sparse_attention",
    "block_statistics",
    "dense_attention",
    "gathered_share",
    "listed_blocks",
    "merge_attention",
    "neighborhood_attention",
    "seen_share",
    "select_blocks",
    "visited_share",
]
