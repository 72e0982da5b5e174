"""Binding of Z-Image and Z-Image Omni."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    patched,
    reversed_time,
    told_native,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import scaled_tables
from diffaccel.layout import Grid, Segment, TokenLayout

MULTIPLE = 32
"""Images and texts are filled up to multiples of this length; what fills them is attended to."""


class ZImageBinding(Binding):
    """Z-Image: the image, then text. Omni: texts, images to edit, the image, SigLIP features.

    Latents are a list of samples (C, F, H, W), in Omni of lists of images of which the last one
    is denoised. Samples whose image begins at different places have no layout in common.
    """

    patterns = (
        (r"noise_refiner\.\d+\.attention", "self"),
        (r"layers\.\d+\.attention", "joint"),
    )
    block_outputs = ("x",)
    mixes_text = r"layers\..+"
    unguided = "its samples and predictions come in lists"
    latents = "x"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "z-image"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def timestep(self, call: ModelCall) -> Tensor | float | None:
        return reversed_time(call.arguments.get("t"))

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        samples, texts, features = call["x"], call["cap_feats"], call.arguments.get("siglip_feats")
        is_omni = isinstance(samples[0], list)
        images = {self._images(call, sample if is_omni else [sample]) for sample in samples}
        lengths = [sum(map(_filled, map(len, text if is_omni else [text]))) for text in texts]
        if len(images) > 1 or (is_omni and layer.kind == "joint" and len(set(lengths)) > 1):
            raise LayoutUnknown("the images of the samples begin at different tokens")
        (image,) = images
        if layer.kind == "self":
            return TokenLayout(image)
        text = Segment("text", max(lengths))
        if not is_omni:
            return TokenLayout((*image, text))
        if features is None or features[0] is None or model.siglip_embedder is None:
            return TokenLayout((text, *image))
        count = max(sum(map(_features, sample)) for sample in features)
        return TokenLayout((text, *image, Segment("condition", count)))

    def _images(self, call: ModelCall, images: list[Tensor | None]) -> tuple[Segment, ...]:
        """Describes the images of one sample, the one to denoise last, and what fills them up."""
        patch = call.arguments.get("patch_size", 2)
        patch_t = call.arguments.get("f_patch_size", 1)
        segments: list[Segment] = []
        for index, image in enumerate(images):
            if image is None:
                segments.append(Segment("condition", MULTIPLE))
                continue
            sizes = zip(image.shape[-3:], (patch_t, patch, patch), strict=True)
            frames, height, width = (patched(*size) for size in sizes)
            grid = frames, height, width
            is_last = index == len(images) - 1
            segments.append(Segment("visual" if is_last else "condition", prod(grid), grid))
            segments.append(Segment("condition", _filled(prod(grid)) - prod(grid)))
        return tuple(segments)

    def skip_reason(self, name: str) -> str:
        refiners = {"context": "text token refiner", "siglip": "refiner of image features"}
        return refiners.get(name.split("_")[0]) or super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        return {
            "x": [zeros(model, config.in_channels, 1, *latents) for _ in range(batch)],
            "t": zeros(model, batch),
            "cap_feats": [zeros(model, text, config.cap_feat_dim) for _ in range(batch)],
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.rope_embedder
        tables = rope.freqs_cis or rope.precompute_freqs_cis(
            rope.axes_dims, rope.axes_lens, theta=rope.theta
        )
        return exchanged(rope, "freqs_cis", scaled_tables(tables, rope.theta, axes))


def _filled(length: int) -> int:
    return length + -length % MULTIPLE


def _features(item: Tensor | None) -> int:
    """Tokens of one image's SigLIP features (H, W, C)."""
    return MULTIPLE if item is None else _filled(item.shape[0] * item.shape[1])
