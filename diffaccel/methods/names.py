"""Names of the attention methods on the command line and in recipes."""

METHODS: dict[str, str] = {
    "full": "diffaccel.methods.full:FullAttn",
    "sparse": "diffaccel.methods.block_sparse.sparse:SparseAttn",
    "rectified": "diffaccel.methods.block_sparse.rectified:RectifiedSpaAttn",
    "neighborhood": "diffaccel.methods.windows.neighborhood:NeighborhoodAttn",
    "sliding-window": "diffaccel.methods.windows.sliding:SlidingWindowAttn",
    "agent": "diffaccel.methods.grouped.agent:AgentAttn",
    "token-merging": "diffaccel.methods.grouped.token_merging:TokenMergingAttn",
}
"""Name -> "module:class"; text, so that reading the table loads no method and no PyTorch."""
