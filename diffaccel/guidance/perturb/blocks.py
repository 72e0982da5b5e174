"""Damaging whole blocks of a denoiser on purpose, for guidance by comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffaccel.bindings import AttentionLayer, Binding
from diffaccel.bindings.base import forward_signature
from diffaccel.bindings.exchange import exchanged
from diffaccel.errors import check_kinds


@dataclass(frozen=True, slots=True)
class SkipLayers:
    """Leaves out the blocks of some layers: their outputs are their inputs.

    Skip-layer guidance (SLG) as Stable Diffusion 3.5 has it (Stability AI, 2024,
    https://github.com/Stability-AI/sd3.5) and, for videos, spatiotemporal skip guidance with
    skipped residuals ("Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling",
    Hyung et al., 2024, https://arxiv.org/abs/2411.18664).

    Args:
        layers: Attention layers, from 0 as `report()` lists them, whose blocks are left out.
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "layers", checked_layers(self.layers))

    @property
    def touched(self) -> tuple[int, ...]:
        """The layers whose blocks are damaged, ascending."""
        return self.layers

    @contextmanager
    def applied(
        self, model: nn.Module, binding: Binding, layers: tuple[AttentionLayer, ...], step: int
    ) -> Iterator[None]:
        """While active, the blocks pass through what they get."""
        with ExitStack() as stack:
            for name in dict.fromkeys(layers[index].block for index in self.layers):
                block = model.get_submodule(name)
                stack.enter_context(exchanged(block, "forward", pass_through(block, binding)))
            yield


@dataclass(frozen=True, slots=True)
class PermuteTokens:
    """Shuffles the visual tokens before the blocks of some layers, anew for each and never back.

    Token perturbation guidance (TPG, "Token Perturbation Guidance for Diffusion Models", Rajabi
    et al., 2025, https://arxiv.org/abs/2506.10036). Text stays in order. The order has a generator
    of its own, so that the noise of the sampler is the same as without guidance.

    Args:
        layers: Attention layers, from 0 as `report()` lists them.
        seed: Of the shuffling.
    """

    layers: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "layers", checked_layers(self.layers))

    @property
    def touched(self) -> tuple[int, ...]:
        """The layers whose blocks are damaged, ascending."""
        return self.layers

    @contextmanager
    def applied(
        self, model: nn.Module, binding: Binding, layers: tuple[AttentionLayer, ...], step: int
    ) -> Iterator[None]:
        """While active, the blocks get shuffled tokens.

        Args:
            model: The denoiser.
            binding: Of its family.
            layers: All its attention layers.
            step: Denoising step, which with the seed and the layer decides about the order.
        """
        blocks = {layers[index].block: index for index in reversed(self.layers)}
        with ExitStack() as stack:
            for name, index in blocks.items():
                block = model.get_submodule(name)
                seed = hash((self.seed, step, index)) & 0x7FFF_FFFF
                stack.enter_context(exchanged(block, "forward", _shuffling(block, binding, seed)))
            yield


def checked_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Returns layer indices ascending and without repetition, or raises ValueError."""
    valid = [isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers]
    if not layers or not all(valid):
        raise ValueError(
            f"layers must be at least one integer from 0, got layers={layers!r}; "
            "the report of an attachment lists the layers of a model"
        )
    return tuple(sorted(set(layers)))


def pass_through(block: nn.Module, binding: Binding) -> Callable[..., Any]:
    """Returns a forward whose outputs are the inputs of a block."""
    owner: Any = type(block)
    signature = forward_signature(owner)
    names = [name for name in binding.block_outputs if name in signature.parameters]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(None, *args, **kwargs).arguments
        # A block of text and image in one sequence gets no text of its own, and returns none.
        present = [name for name in names if given.get(name) is not None]
        chosen = names if binding.returns_none else present
        outputs = tuple(given.get(name) for name in chosen)
        return outputs if len(outputs) > 1 else outputs[0]

    return forward


def splits_tokens(block: nn.Module, binding: Binding) -> bool:
    """Whether context parallelism of diffusers splits what a block hands on, or joins it."""
    registry: Any = getattr(block, "_diffusers_hook", None)
    for name, hook in ({} if registry is None else registry.hooks).items():
        if name.startswith("cp_output"):
            return True
        if name.startswith("cp_input") and not hook.metadata.keys().isdisjoint(
            binding.block_outputs
        ):
            return True
    return False


def _shuffling(block: nn.Module, binding: Binding, seed: int) -> Callable[..., Any]:
    owner: Any = type(block)
    stock, signature = block.forward, forward_signature(owner)
    outputs = binding.block_outputs
    visual = "hidden_states" if "hidden_states" in outputs else outputs[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(None, *args, **kwargs)
        hidden = given.arguments[visual]
        order = torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(seed))
        given.arguments[visual] = hidden[:, order.to(hidden.device)]
        return stock(*given.args[1:], **given.kwargs)

    return forward
