"""The work of an attention kernel: operations, and bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.benchmarks.ops.shapes import Shape


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, whoever does it.

    Args:
        flops: Additions and multiplications of the two matrix products.
        bytes: Each input read once, each output written once.
    """

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def kept_flops(pairs: int, dim: int) -> int:
    """Operations of `pairs` query-key pairs over all heads: 2 D for the score, 2 D for the sum."""
    return 4 * pairs * dim


def attention_work(shape: Shape, pairs: int, itemsize: int) -> Work:
    """Attention of the visual queries over `pairs` pairs; all keys and values are read."""
    tokens = 4 * shape.visual + 2 * shape.text  # query, key, value, output; text key and value
    return Work(kept_flops(pairs, shape.dim), tokens * shape.heads * shape.dim * itemsize)
