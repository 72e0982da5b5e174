"""Lets an untrained Wan transformer tell its tokens where they are, by its weights alone.

Wan has rotary positions in self-attention and nothing else that knows about places. Tokens of
pure noise see how far others are and nothing more, so that places can be learned from the
borders alone, and slowly. Here the first block starts with a code of the distance to the
borders, and the second one smooths it. Own design; training may change all of it.

In block 0, each head looks at a window of its row (its column, its time) that lies to one side
of the query. Where a border cuts the window off, fewer tokens are averaged, and the mean of
noise over fewer tokens is larger. It is taken over differences within a token, which flat areas
do not change, and the feed-forward layer measures its size. In block 1, three heads average the
codes of a column, a row and a frame.
"""

from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

THETA = 10_000.0  # of the rotary positions
SEEN_CHANNELS = 12  # whose differences tell places; more leave no room for the codes
UNITS = 24  # directions in which the size of a mean is measured
GAIN = 0.4  # of what is measured
TYPICAL = 20.0  # size of it that becomes a code of 0
SMOOTH_GAIN = 2.0


@dataclass(frozen=True, slots=True)
class Wave:
    """One rotary frequency of one axis in the attention logits of a head.

    Attributes:
        axis: 0 for frames, 1 for rows, 2 for columns.
        index: Which frequency of the axis, 0 is the fastest.
        height: Of the logits.
        shift: Tokens before the query at which they are highest.
    """

    axis: int
    index: int
    height: float
    shift: float = 0.0


def _same(axis: int) -> tuple[Wave, ...]:
    """Keeps to the query's own row, column or frame."""
    return Wave(axis, 0, 4.0), Wave(axis, 1, 3.0)


WINDOWS = (
    (Wave(2, 1, 6.0, shift=3.5), *_same(1), *_same(0)),
    (Wave(2, 1, 6.0, shift=-3.5), *_same(1), *_same(0)),
    (Wave(1, 2, 10.0, shift=7.0), *_same(2), *_same(0)),
    (Wave(0, 2, 10.0, shift=4.0), *_same(1), *_same(2)),
)
AVERAGES = (_same(2), _same(1), _same(0))
READS = ((0, 1), (2,), (3,))  # codes that the heads of block 1 average


@torch.no_grad()
def give_places(model: WanTransformer3DModel) -> None:
    """Sets the first two blocks as the module says.

    Args:
        model: Four heads of width 64; a patch (1, 2, 2) of at most 16 channels.
    """
    channels, width = model.config.in_channels, model.patch_embedding.out_channels
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    own, changes = 4 * channels, 3 * min(channels, SEEN_CHANNELS)
    content = basis[:, :own]
    code = basis[:, own + 4 * changes :]
    model.patch_embedding.weight.copy_(
        (content * (width / own) ** 0.5).view(width, channels, 1, 2, 2)
    )
    model.patch_embedding.bias.zero_()
    # Differences of the four latent pixels of a token, per channel.
    haar = torch.tensor([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    reader = torch.kron(torch.eye(channels), haar)[:changes] @ content.T

    first, second = model.blocks[0], model.blocks[1]
    _set_logits(first.attn1, WINDOWS)
    size = width // first.attn1.heads
    hidden = first.ffn.net[0].proj
    for head in range(4):
        means = basis[:, own + head * changes : own + (head + 1) * changes]
        rows = slice(head * size, head * size + changes)
        first.attn1.to_v.weight[rows] = reader
        first.attn1.to_out[0].weight[:, rows] = means
        units = torch.nn.functional.normalize(torch.randn(UNITS, changes), dim=1) @ means.T
        place = slice(2 * head * UNITS, 2 * (head + 1) * UNITS)
        hidden.weight[place] = torch.cat([units, -units])
        hidden.bias[place] = 0
        first.ffn.net[2].weight[:, place] = GAIN * code[:, head, None]
        first.ffn.net[2].bias.sub_(GAIN * TYPICAL * code[:, head])

    _set_logits(second.attn1, AVERAGES)
    written = 4
    for head, read in enumerate(READS):
        for offset, index in enumerate(read):
            row = head * size + offset
            second.attn1.to_v.weight[row] = code[:, index]
            second.attn1.to_out[0].weight[:, row] = SMOOTH_GAIN * code[:, written]
            written += 1


def _set_logits(attention: WanAttention, heads: tuple[tuple[Wave, ...], ...]) -> None:
    """Sets the logits of the first heads to sums of waves of the distance.

    Content hardly changes them, and other heads keep what they have.
    """
    size = attention.to_q.out_features // attention.heads
    axis = 2 * (size // 6)
    axes = (size - 2 * axis, axis, axis)
    heights = sum(wave.height for waves in heads for wave in waves) / len(heads)
    for projection, norm in (
        (attention.to_q, attention.norm_q),
        (attention.to_k, attention.norm_k),
    ):
        used = slice(0, len(heads) * size)
        projection.weight[used] *= 0.1
        projection.bias[used] = 0
        norm.weight[used] = (heights / size**0.5) ** 0.5
    for head, waves in enumerate(heads):
        for wave in waves:
            start = head * size + sum(axes[: wave.axis]) + 2 * wave.index
            angle = Tensor([-wave.shift * THETA ** (-2 * wave.index / axes[wave.axis])])
            size_of_pair = 4 * (wave.height / heights) ** 0.5
            attention.to_q.bias[start] = size_of_pair * angle.cos()
            attention.to_q.bias[start + 1] = size_of_pair * angle.sin()
            attention.to_k.bias[start] = size_of_pair
