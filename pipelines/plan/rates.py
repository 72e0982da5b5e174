"""How fast this machine multiplies, measured in a second on small problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F

from diffaccel.pipelines.plan.image import Phase


@dataclass(frozen=True, slots=True)
class Rates:
    """Operations per second.

    Args:
        attention: Of dense attention, 4 D per query-key pair and head.
        product: Of a matrix product.
        convolution: Of a 3 x 3 convolution.
    """

    attention: float
    product: float
    convolution: float

    def denoising_seconds(self, phase: Phase) -> float:
        """Time of all denoising steps of a phase."""
        attention = phase.attention_flop * phase.shares.cost / self.attention
        return phase.rows * (attention + phase.other_flop * phase.other_share / self.product)

    def autoencoder_seconds(self, phase: Phase) -> float:
        """Time of encoding and decoding in a phase."""
        return (phase.autoencoder_flop or 0.0) / self.convolution


def measure_rates(device: str, dtype: torch.dtype, heads: int, dim: int) -> Rates:
    """Measures the rates with heads of the model, each the best of some calls.

    Args:
        device: Where.
        dtype: Of attention and products; autoencoders run in fp32.
        heads: H of the attention.
        dim: D of the attention.
    """
    is_cpu = device == "cpu"
    tokens, side, pixels = (1536, 768, 128) if is_cpu else (16384, 8192, 1024)
    query = torch.randn(1, heads, tokens, dim, device=device, dtype=dtype)
    square = torch.randn(side, side, device=device, dtype=dtype)
    picture = torch.randn(1, 32, pixels, pixels, device=device)
    weight = torch.randn(32, 32, 3, 3, device=device)
    with torch.inference_mode():
        attention = _best(lambda: F.scaled_dot_product_attention(query, query, query), device)
        product = _best(lambda: square @ square, device)
        convolution = _best(lambda: F.conv2d(picture, weight, padding=1), device)
    return Rates(
        4.0 * heads * tokens**2 * dim / attention,
        2.0 * side**3 / product,
        2.0 * weight.numel() * pixels**2 / convolution,
    )


def _best(call: Callable[[], torch.Tensor], device: str, budget: float = 0.3) -> float:
    """Seconds of the fastest call; at least two, then as many as fit the budget."""
    best, begun, calls = float("inf"), perf_counter(), 0
    while calls < 2 or perf_counter() - begun < budget:
        started = perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        elif device == "mps":
            torch.mps.synchronize()
        best, calls = min(best, perf_counter() - started), calls + 1
    return best
