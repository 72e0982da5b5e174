"""Names of the attention methods on the command line and in recipes."""

METHODS: dict[str, str] = {
    "full": "diffaccel.methods.full:FullAttn",
    "sparse": "diffaccel.methods.block_sparse.sparse:SparseAttn",
    "rectified": "diffaccel.methods.block_sparse.rectified:RectifiedSpaAttn",
    "sol": "diffaccel.methods.block_sparse.sol:SolAttn",
    "vmoba": "diffaccel.methods.block_sparse.vmoba:VMoBAAttn",
    "moba": "diffaccel.methods.block_sparse.moba:MoBAAttn",
    "biformer": "diffaccel.methods.block_sparse.biformer:BiFormerAttn",
    "radial": "diffaccel.methods.block_sparse.radial:RadialAttn",
    "sliding-tile": "diffaccel.methods.block_sparse.sliding_tile:SlidingTileAttn",
    "flexprefill": "diffaccel.methods.block_sparse.flexprefill:FlexPrefillAttn",
    "sparge": "diffaccel.methods.block_sparse.sparge:SpargeAttn",
    "hip": "diffaccel.methods.block_sparse.hip:HiPAttn",
    "hyper": "diffaccel.methods.block_sparse.hyper:HyperAttn",
    "power": "diffaccel.methods.block_sparse.power:PowerAttn",
    "svg": "diffaccel.methods.block_sparse.svg:SVGAttn",
    "vggt": "diffaccel.methods.block_sparse.vggt:VGGTAttn",
    "sub-block": "diffaccel.methods.block_sparse.sub_block:SubBlockAttn",
    "neighborhood": "diffaccel.methods.windows.neighborhood:NeighborhoodAttn",
    "sliding-window": "diffaccel.methods.windows.sliding:SlidingWindowAttn",
    "agent": "diffaccel.methods.grouped.agent:AgentAttn",
    "token-merging": "diffaccel.methods.grouped.token_merging:TokenMergingAttn",
}
"""Name -> "module:class"; text, so that reading the table loads no method and no PyTorch."""
