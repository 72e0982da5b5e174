"""Muon: momentum whose matrix updates are made orthogonal, for the hidden layers.

Source: "Muon: An optimizer for hidden layers in neural networks", K. Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/ ; update scale of "Muon is Scalable for LLM Training",
J. Liu et al., 2025, https://arxiv.org/abs/2502.16982 .

Written by hand beside `torch.optim.Muon` for three things that one lacks: the iterations run in
fp32, since half precision is slow on processors without units for it; the weights of convolutions
count as matrices; and weights of equal shape are made orthogonal in one batch.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Moves the singular values of (K, rows, columns) matrices near 1, fp32."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates, at the update size of AdamW.

    Args:
        matrices: The weights; those of convolutions count as matrices (outputs, inputs x area).
        lr: Learning rate, comparable with that of AdamW.
        momentum: Share of the old direction that is kept.
        weight_decay: Decoupled decay.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates all weights; equal shapes are made orthogonal together."""
        for group in self.param_groups:
            directions: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(state["momentum"], group["momentum"])
                direction = nesterov.flatten(1)
                directions.setdefault(direction.shape, []).append((weight, direction))
            for shape, pairs in directions.items():
                updates = orthogonalise(torch.stack([direction for _, direction in pairs]))
                scale = 0.2 * max(shape) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.view(weight.shape), alpha=-group["lr"] * scale)
