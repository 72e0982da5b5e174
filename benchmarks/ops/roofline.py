"""What a kernel costs at least: max(FLOP / arithmetic rate, bytes / bandwidth).

Each input is read once and each output written once. The two rates are measured on the spot, by a
large matrix product and a large copy, or stated by the user.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from diffaccel.benchmarks.ops.shapes import Shape
from diffaccel.benchmarks.ops.timing import time_alone
from diffaccel.benchmarks.ops.windows import window_for, window_pairs
from diffaccel.benchmarks.rows import Column, table
from diffaccel.methods.block_sparse.budgets import Ask

_PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


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
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do.

    Args:
        tflops: TFLOP/s of a large matrix product in the dtype at hand.
        gigabytes_per_second: Bytes read and written by a large copy, in 1e9 per second.
    """

    tflops: float
    gigabytes_per_second: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of one kernel.

    Args:
        arithmetic_ms: FLOP / rate.
        memory_ms: Bytes / bandwidth.
    """

    arithmetic_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The larger one."""
        return max(self.arithmetic_ms, self.memory_ms)

    @property
    def bound(self) -> str:
        """What it is made of."""
        return "arithmetic" if self.arithmetic_ms >= self.memory_ms else "memory"


def kept_flops(pairs: int, dim: int) -> int:
    """Operations of `pairs` query-key pairs over all heads: 2 D for the score, 2 D for the sum."""
    return 4 * pairs * dim


def attention_work(shape: Shape, pairs: int, itemsize: int) -> Work:
    """Attention of the visual queries over `pairs` pairs; all keys and values are read."""
    tokens = 4 * shape.visual + 2 * shape.text  # query, key, value, output; text key and value
    return Work(kept_flops(pairs, shape.dim), tokens * shape.heads * shape.dim * itemsize)


def floor_of(work: Work, ceilings: Ceilings) -> Floor:
    """Puts work under the ceilings."""
    return Floor(
        work.flops / (ceilings.tflops * 1e12) * 1e3,
        work.bytes / (ceilings.gigabytes_per_second * 1e9) * 1e3,
    )


def measure_ceilings(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> Ceilings:
    """Measures both: the fastest of some large products and copies of random numbers.

    A CPU without units for a dtype converts it, so that fp32 counts there too.
    """
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    tflops = max(_product_tflops(kind, device, seconds) for kind in dtypes)
    size = _COPY_BYTES[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = min(time_alone(lambda: target.copy_(source), device, seconds))
    return Ceilings(tflops, 2 * size / copy_ms / 1e6)


def _product_tflops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Rate of a large product, or of a small one where the large one would take too long."""
    rate = 0.0
    for side in (256, _PRODUCT_SIDE[device.type]):
        if rate and 2 * side**3 / rate / 1e12 > seconds:
            break
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(left)
        call = partial(torch.mm, left, right, out=product)
        rate = 2 * side**3 / min(time_alone(call, device, seconds)) / 1e9
    return rate


def block_sparse_work(
    shape: Shape, density: float, block: int, itemsize: int, correction: str = "none"
) -> Work:
    """The block-sparse op with lists of equal length.

    Args:
        shape: The tokens.
        density: Share of the key blocks in each list.
        block: Tokens per block.
        itemsize: Bytes of an element of query, key, value and output.
        correction: "none", "pooled" (scale and bias per query block) or "centroids" (a summary of
            each key block, with the variance term).
    """
    heads, visual, dim = shape.heads, shape.visual, shape.dim
    blocks = -(-visual // block)
    listed = Ask(density).per_row(blocks)
    pairs = round(heads * visual * (listed / blocks * visual + shape.text))
    lists = 4 * heads * blocks * (listed + 1)
    extra = Work(0, lists)
    if correction == "pooled":
        extra = Work(0, lists + 4 * heads * blocks * (dim + 1))
    if correction == "centroids":
        extra = Work(6 * heads * visual * blocks * dim, lists + 4 * heads * blocks * (3 * dim + 1))
    return attention_work(shape, pairs, itemsize) + extra


def index_work(shape: Shape, block: int, itemsize: int) -> Work:
    """Estimating and selecting: query, key and value are read, block scores computed."""
    blocks = -(-shape.visual // block)
    scores = 2 * shape.heads * blocks * (blocks + shape.text) * shape.dim
    tokens = 3 * shape.heads * shape.visual * shape.dim
    return Work(tokens + scores, tokens * itemsize)


@dataclass(frozen=True, slots=True)
class FloorRow:
    """The floor of one kernel; `density` is "" where there is none."""

    shape: str
    dtype: str
    kernel: str
    density: str
    work: Work
    floor: Floor


_COLUMNS: dict[str, Column] = {
    "shape": "{0.shape}",
    "dtype": "{0.dtype}",
    "kernel": "{0.kernel}",
    "density": "{0.density}",
    "GFLOP": lambda row: f"{row.work.flops / 1e9:.4g}",
    "MB": lambda row: f"{row.work.bytes / 1e6:.4g}",
    "FLOP floor ms": "{0.floor.arithmetic_ms:.4g}",
    "byte floor ms": "{0.floor.memory_ms:.4g}",
    "floor ms": "{0.floor.ms:.4g}",
    "bound by": "{0.floor.bound}",
}


def roofline_table(
    shapes: tuple[Shape, ...],
    densities: tuple[float, ...],
    block: int,
    ceilings: dict[str, Ceilings],
) -> str:
    """Writes the floors of every kernel as Markdown, for each dtype that has ceilings."""
    rows = [
        FloorRow(shape.name, dtype, name, density, work, floor_of(work, limits))
        for shape in shapes
        for dtype, limits in ceilings.items()
        for name, density, work in _kernels(
            shape, densities, block, getattr(torch, dtype).itemsize
        )
    ]
    return "\n".join(table(rows, _COLUMNS))


def _kernels(
    shape: Shape, densities: tuple[float, ...], block: int, itemsize: int
) -> list[tuple[str, str, Work]]:
    rows = [
        ("dense", "1", attention_work(shape, shape.all_pairs, itemsize)),
        ("estimate and select", "", index_work(shape, block, itemsize)),
    ]
    for density in densities:
        for correction in ("none", "pooled", "centroids"):
            name = "block-sparse" + ("" if correction == "none" else f", {correction}")
            work = block_sparse_work(shape, density, block, itemsize, correction)
            rows.append((name, f"{density:g}", work))
        pairs = window_pairs(shape, window_for(shape, density))
        rows.append(("neighborhood", f"{density:g}", attention_work(shape, pairs, itemsize)))
    return rows
