"""Calls in blocks, for tests of selectors, budgets and correctors."""

from dataclasses import replace

import torch

from diffaccel.kernels import StatisticsCall, block_lists
from diffaccel.kernels.block_statistics.op import summarise
from diffaccel.layout import TokenLayout
from diffaccel.methods.block_sparse.block_call import BlockCall, BlockRows, Chosen
from diffaccel.methods.block_sparse.order import token_order
from diffaccel.methods.inputs import ExactTokens, Position, VisualTokens

EVERYTHING = frozenset(
    {
        "value_mean",
        "query_spread",
        "key_spread",
        "query_variance",
        "key_variance",
        "value_deviation",
    }
)


def smooth_tokens(
    layout, batch=1, heads=2, channels=32, dtype=torch.float32, seed=0, noise=0.5, smooth=2.0
):
    """Tokens that vary smoothly over the grid, as those of a picture do, plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def one():
        tokens = torch.randn(batch, layout.length, heads, channels, generator=generator)
        if layout.visual is None:
            return tokens.to(dtype)
        frames, height, width = layout.grid
        shape = (batch, heads * channels, max(2, frames // 2), height // 4 + 2, width // 4 + 2)
        field = torch.nn.functional.interpolate(
            torch.randn(shape, generator=generator), (frames, height, width), mode="trilinear"
        )
        field = field.flatten(2).transpose(1, 2).unflatten(2, (heads, channels))
        visual = layout.visual_slice
        tokens[:, visual] = smooth * field + noise * tokens[:, visual]
        return tokens.to(dtype)

    return one(), one(), one()


def block_call(
    spread=1.0, tokens=111, text=5, seed=0, block=16, batch=2, heads=2, dim=32, valid=None
):
    """A call whose blocks have centres of their own, around which tokens scatter."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block)

    def scattered():
        shape = batch, blocks, heads, dim
        centers = torch.randn(*shape, generator=generator).repeat_interleave(block, 1)
        noise = torch.randn(centers.shape, generator=generator)
        return (centers + spread * noise)[:, :tokens]

    query, key, value = (scattered() for _ in range(3))
    text_key, text_value = (
        torch.randn(batch, text, heads, dim, generator=generator) for _ in range(2)
    )
    layout = TokenLayout.image(1, tokens)
    scale = dim**-0.5
    visual = VisualTokens(query, key, value, valid, layout, scale)
    text = ExactTokens(text_key, text_value, None)
    order = token_order(layout.grid, "raster", block)
    return BlockCall(visual, text, order, statistics_of(visual, block), Position())


def statistics_of(visual, block):
    """All statistics that selectors and correctors may need."""
    tokens = visual.query, visual.key, visual.value
    return summarise(StatisticsCall(*tokens, block, visual.valid, needs=EVERYTHING))


def summarised(call):
    """The same tokens, which were changed, with the statistics that they have now."""
    return replace(call, statistics=statistics_of(call.visual, call.block))


def all_rows(call):
    """All query blocks of a call."""
    return BlockRows(call, slice(0, call.number))


def chosen(call, kept):
    """What a selector would hand on that keeps these blocks (B, H, NB, NB)."""
    return Chosen(call, *block_lists(kept, call.number))


def best_blocks(call, count):
    """Keeps the blocks with the largest predicted attention: (B, H, NB, NB) bool."""
    probability = all_rows(call).probability[..., :-1]
    best = probability.topk(count, -1).indices
    return torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, best, True)
