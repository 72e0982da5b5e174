"""How much a denoiser or an autoencoder computes, counted by PyTorch on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.attach.attachment import add_attention_hook, remove_attention_hook
from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.bindings import AttentionLayer, ModelCall, binding_of
from diffaccel.bindings.exchange import exchanged
from diffaccel.errors import InputError
from diffaccel.layout import TokenLayout

AUTOCAST = torch.autocast
FX: Any = _config


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """One attention layer that a method may serve, at one size.

    Args:
        layer: Which.
        layout: Its tokens.
        heads: H.
        dim: D.
    """

    layer: AttentionLayer
    layout: TokenLayout
    heads: int
    dim: int

    @property
    def dense_flop(self) -> float:
        """Operations of dense attention on one sample: 2 D for the scores, 2 D for the sum."""
        return 4.0 * self.layout.length**2 * self.heads * self.dim


def served_layers(model: Any, latents: tuple[int, ...], text: int) -> tuple[ServedLayer, ...]:
    """Lists the attention layers that a method may serve, with their tokens.

    Args:
        model: A denoiser, on any device.
        latents: Its latents (h, w), or (f, h, w) of a video.
        text: Text tokens, joint or cross-attended.
    """
    model = skeleton_of(model)
    binding = binding_of(model)
    layers = binding.layers(model)
    seen = SeenHeads()
    names = tuple(layer.name for layer in layers)
    add_attention_hook(model, seen, names)
    try:
        runs = _runs(model, latents, text)
    finally:
        remove_attention_hook(model, seen)
    if not runs:
        return told_layers(model, latents, text)
    return tuple(
        ServedLayer(layer, seen.layouts[layer.name], *seen.heads[layer.name])
        for layer in layers
        if layer.name in seen.layouts
    )


def told_layers(model: Any, latents: tuple[int, ...], text: int) -> tuple[ServedLayer, ...]:
    """Lists the same layers without a call, by what the binding and the modules tell."""
    model = skeleton_of(model)
    binding = binding_of(model)
    call = ModelCall(binding.example_call(model, latents, text), {})
    found = []
    for layer in binding.layers(model):
        native = binding.native(model, layer)
        layout = replace(binding.layout(model, call, layer), native=native)
        heads = _written_heads(model.get_submodule(layer.name))
        found.append(ServedLayer(layer, layout, *heads))
    return tuple(found)


class SeenHeads(AttentionHook):
    """Writes down what tokens and heads the layers of a call have."""

    is_active = True

    def __init__(self) -> None:
        self.layouts: dict[str, TokenLayout] = {}
        self.heads: dict[str, tuple[int, int]] = {}

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        layout = call.layout
        if layout is not None and not (call.is_cross_attention or call.is_text_part):
            self.layouts[call.layer.name] = layout
            self.heads[call.layer.name] = call.query.shape[2], call.query.shape[3]
        return compute(call)


def attention_heads(model: Any) -> tuple[int, int]:
    """Returns H and D of the first attention layer that a method may serve."""
    binding = binding_of(model)
    grid = binding.native(model, binding.layers(model)[0])
    is_video = grid is not None and grid[0] > 1
    first, *_ = served_layers(model, (3, 32, 32) if is_video else (32, 32), 16)
    return first.heads, first.dim


def other_flop(model: Any, latents: tuple[int, ...], text: int) -> float:
    """Operations of one call on one sample, apart from the attention that a method may serve.

    Matrix products, convolutions and cross-attention; norms and the like are left out.

    Args:
        model: A denoiser, on any device.
        latents: Its latents (h, w), or (f, h, w) of a video.
        text: Text tokens, joint or cross-attended.

    Where the denoiser cannot be called without values, two for each parameter and token.

    Raises:
        InputError: The denoiser does not take latents of this size.
    """
    model = skeleton_of(model)
    with FlopCounterMode(display=False) as counter:
        runs = _runs(model, latents, text)
    if not runs:
        tokens = max(x.layout.length for x in served_layers(model, latents, text))
        return 2.0 * tokens * sum(p.numel() for p in model.parameters())
    served = sum(layer.dense_flop for layer in served_layers(model, latents, text))
    return counter.get_total_flops() - served


class _MasksFollow(TorchFunctionMode):
    """Puts masks, which bindings keep on the CPU to read them, where the queries are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and given.get("attn_mask") is not None:
            query = args[0] if args else given["query"]
            given["attn_mask"] = given["attn_mask"].to(query.device)
        return func(*args, **given)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """Does nothing on the meta device, which PyTorch refuses."""
    return nullcontext() if device_type == "meta" else AUTOCAST(device_type, *args, **kwargs)


def _runs(model: Any, latents: tuple[int, ...], text: int) -> bool:
    """Whether a denoiser can be called where tensors have shapes alone.

    Raises:
        InputError: It can, but not with latents of this size.
    """
    reason = _why_not(model, latents, text)
    if not reason:
        return True
    if _why_not(model, (3, 32, 32) if len(latents) == 3 else (32, 32), text):
        return False
    raise InputError(
        f"{type(model).__name__} must take latents of {'x'.join(map(str, latents))} elements, it "
        f"does not ({reason}); choose another size"
    )


def _why_not(model: Any, latents: tuple[int, ...], text: int) -> str:
    """Returns why a call without values fails, "" where it does not."""
    try:
        whole = FX.patch(meta_nonzero_assume_all_nonzero=True)  # no text is padded
        with torch.no_grad(), whole, _MasksFollow(), exchanged(torch, "autocast", _autocast):
            model(**binding_of(model).example_call(model, latents, text))
    except (ValueError, RuntimeError, TypeError, NotImplementedError, NameError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _written_heads(module: Any) -> tuple[int, int]:
    """H and D as the attributes of an attention layer tell them."""
    heads = next(getattr(module, name) for name in HEADS if hasattr(module, name))
    dim = getattr(module, "head_dim", None)
    if dim is None:
        width = getattr(module, "inner_dim", None)
        queries = next(part for part in module.modules() if isinstance(part, nn.Linear))
        dim = (width or queries.out_features) // heads
    return heads, dim


HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads")
"""Names under which attention layers keep their number of heads."""


def autoencoder_flop(vae: Any, tiles: Mapping[tuple[int, int], int], part: str) -> float:
    """Operations that encode or decode one picture in tiles.

    Args:
        vae: An `AutoencoderKL` on the meta device.
        tiles: Sizes (width, height) in pixels of the tiles, with their numbers.
        part: "encode" or "decode".
    """
    config = vae.config
    channels, scale = config.in_channels, 1
    if part == "decode":
        channels, scale = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
    total = 0.0
    for (width, height), count in tiles.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            getattr(vae, part)(
                torch.empty(1, channels, height // scale, width // scale, device="meta")
            )
        total += count * counter.get_total_flops()
    return total


def skeleton_of(model: Any) -> Any:
    """Returns a denoiser on the meta device, where calls compute nothing: a twin if need be."""
    if model.device.type == "meta":
        return model
    with torch.device("meta"):
        return type(model).from_config(model.config).requires_grad_(False)
