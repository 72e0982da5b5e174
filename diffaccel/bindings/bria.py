"""Bindings of Bria 3.2, Fibo and Fibo 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, angles
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    ModelCall,
    image_grid,
    target_and_references,
    told_native,
    zeros,
)
from diffaccel.bindings.flux import FluxBinding
from diffaccel.layout import Grid, Segment, TokenLayout


class BriaBinding(FluxBinding):
    """Bria 3.2: FLUX without pooled prompts, with both prompts in one batch."""

    batches_prompts = True


class BriaFiboBinding(BriaBinding):
    """Fibo: every block gets other features of the text; each latent element is a token."""

    patch = 1
    mixes_text = r"single_transformer_blocks\..+"
    one_prompt = "its prompt is more than one argument of a call"

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        blocks = config.num_layers + config.num_single_layers
        features = [zeros(model, batch, text, config.text_encoder_dim) for _ in range(blocks)]
        call = super().example_call(model, latents, text, batch)
        return call | {"text_encoder_layers": features}


class BriaFibo2Binding(Binding):
    """Fibo 2: gist tokens that sum up the text, the image, images to edit.

    Where the prompts of a batch have different numbers of gist tokens, the gist stands behind the
    images, and a mask excludes what fills it up. The refiner sees images alone.
    """

    patterns = (
        (r"layers\.\d+\.attention", "joint"),
        (r"noise_refiner\.\d+\.attention", "self"),
        (r"layers\.\d+\.cross_attention", "cross"),
    )
    block_outputs = ("x",)
    mixes_text = r"layers\..+"
    scales_rope = True
    one_prompt = "its prompt is more than one argument of a call"

    def family(self, model: Any, pipe: Any) -> str:
        return "bria-fibo2"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def skip_reason(self, name: str) -> str:
        return "text resampler" if name.startswith("perceiver") else super().skip_reason(name)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        latents = call["hidden_states"], *(call.arguments.get("context_latents") or ())
        patch = model.config.patch_size
        images = target_and_references([image_grid(image, patch) for image in latents])
        if layer.kind == "self":
            return TokenLayout(images)
        counts = self._gist_counts(model, call)
        gist = Segment("text", max(counts))
        is_even = min(counts) == max(counts)
        return TokenLayout((gist, *images) if is_even else (*images, gist))

    def _gist_counts(self, model: Any, call: ModelCall) -> list[int]:
        """Returns how many gist tokens each prompt gets, by the function that the model calls."""
        from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

        config, text = model.config, call["encoder_hidden_states"]
        mask = call.arguments.get("encoder_attention_mask")
        lengths = (
            [text.shape[2]] * len(text) if mask is None else call.read(mask, _numbers_of_tokens)
        )
        return compute_gist_count(
            lengths,
            min_gist=config.min_num_gist_tokens,
            max_gist=config.max_num_gist_tokens,
            gist_step=config.gist_step,
            min_text_len=config.gist_min_text_len,
            max_text_len=config.gist_max_text_len,
        )

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        bundles = 1 + len(config.injection_layer_ids)
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, bundles, text, config.cap_feat_dim),
        }

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the tables (places, D / 2), complex, one for each axis.
        rope = model.rope_embedder
        before = rope.freqs_cis
        rope.freqs_cis = [
            _complex_waves(length, dim, rope.theta, axis)
            for length, dim, axis in zip(rope.axes_lens, rope.axes_dims, axes, strict=True)
        ]
        try:
            yield
        finally:
            rope.freqs_cis = before


def _numbers_of_tokens(mask: Tensor) -> list[int]:
    return mask.sum(1).tolist()


def _complex_waves(length: int, dim: int, theta: float, axis: Axis | None) -> Tensor:
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turned = angles(torch.arange(length, dtype=torch.float64), frequencies, axis).float()
    amplitude = 1.0 if axis is None else axis.amplitude
    return torch.polar(torch.full_like(turned, amplitude), turned)
