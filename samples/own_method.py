"""Writes a method of its own: visual tokens see the text and a thinned grid of each other.

Run: .venv/bin/python samples/own_method.py
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.methods.inputs import AttentionInputs, Position
from diffaccel.methods.visual import VisualMethod
from diffaccel.pipelines.loading import EMBEDDED_IMAGE


@dataclass(frozen=True, slots=True)
class ThinnedAttn(VisualMethod):
    """Visual queries see all text, and every `stride`-th row and column of the visual keys.

    Args:
        stride: Distance of the rows and columns that are kept, at least 1.
    """

    stride: int = 2

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got stride={self.stride}")
        VisualMethod.__post_init__(self)

    def attend_visual(self, inputs: AttentionInputs, position: Position, out: Tensor) -> float:
        visual, exact = inputs.visual(), inputs.exact()
        key, value = (
            torch.cat([self.thinned(x, inputs.layout.grid), y], 1)
            for x, y in ((visual.key, exact.key), (visual.value, exact.value))
        )
        mask = None
        if visual.valid is not None:
            mask = torch.cat([self.thinned(visual.valid, inputs.layout.grid), exact.valid], 1)
        out.copy_(
            dense_attention(visual.query, key, value, scale=inputs.scale, key_padding_mask=mask)
        )
        kept = key.shape[1] - exact.key.shape[1]
        return kept / visual.key.shape[1]

    def thinned(self, tokens: Tensor, grid: Any) -> Tensor:
        """Keeps some of (B, N, ...) visual tokens."""
        kept = tokens.unflatten(1, grid)[:, :, :: self.stride, :: self.stride]
        return kept.flatten(1, 3)


pipe = FluxPipeline.from_pretrained(EMBEDDED_IMAGE, dtype=torch.float32)
with pipe.set_attn_processor(ThinnedAttn(stride=2)) as attachment:
    image = pipe(
        "a red apple on a blue background",
        negative_prompt="",
        true_cfg_scale=4.0,
        num_inference_steps=8,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        height=256,
        width=256,
    ).images[0]
    print(attachment.report())
image.save("own_method.png")
