"""Sol-Attn as a whole, in fp64, one query at a time."""

import math

import pytest
import torch
from block_calls import smooth_tokens

from diffaccel.layout import TokenLayout
from diffaccel.methods import SolAttn

BLOCK = 16


def sol_attention(query, key, value, layout, tau, keep):
    """One head: (N, D) fp64 each; text after the visual tokens."""
    length, scale = layout.visual.length, query.shape[-1] ** -0.5
    blocks = torch.arange(length).split(BLOCK)
    means = torch.stack([key[b].mean(0) for b in blocks])
    center = means.mean(0)
    centered, variance = means - center, means.var(0, correction=0)
    output = torch.empty(length, query.shape[-1]).double()
    for n, rows in enumerate(blocks):
        mean_query = query[rows].mean(0)
        proxy = centered @ mean_query
        if keep is None:
            exact = proxy > tau * (mean_query**2 @ variance).sqrt()
        else:
            exact = torch.zeros(len(blocks), dtype=torch.bool)
            exact[proxy.topk(int(keep * len(blocks))).indices] = True
        exact |= (torch.arange(len(blocks)) - n).abs() <= 1
        kept = torch.cat([blocks[m] for m in range(len(blocks)) if exact[m]])
        kept = torch.cat([kept, torch.arange(length, layout.length)])
        left = [m for m in range(len(blocks)) if not exact[m]]
        for row in rows:
            scores = [(key[kept] - center) @ query[row] * scale]
            scores += [(proxy[m] * scale + math.log(len(blocks[m])))[None] for m in left]
            values = torch.cat([value[kept], *(value[blocks[m]].mean(0)[None] for m in left)])
            output[row] = torch.cat(scores).softmax(0) @ values
    return output


@pytest.mark.parametrize("layout", [TokenLayout.image(11, 13), TokenLayout.image(9, 16, 0, 7)])
@pytest.mark.parametrize(("tau", "keep"), [(0.5, None), (1.5, None), (1.0, 0.25)])
def test_sol_attention_equals_its_definition(layout, tau, keep):
    tokens = smooth_tokens(layout, noise=0.4)
    shift = 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    tokens = (tokens[0], tokens[1] + shift, tokens[2])  # a mean of keys that each row sees
    output = SolAttn(tau, keep=keep, block=BLOCK).attend(*tokens, layout)[:, layout.visual_slice]
    for head in range(2):
        expected = sol_attention(*(x[0, :, head].double() for x in tokens), layout, tau, keep)
        torch.testing.assert_close(output[0, :, head].double(), expected, atol=1e-5, rtol=1e-4)
