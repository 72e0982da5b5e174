"""Binding of HiDream-I1."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    image_grid,
    told_native,
    zeros,
)
from diffaccel.bindings.exchange import exchanged
from diffaccel.bindings.rotary import rotations
from diffaccel.layout import Grid, Segment, TokenLayout


class HiDreamBinding(Binding):
    """HiDream: the image, then text of T5 and twice that of Llama.

    An image that is not square is filled up to the model's largest number of tokens, and these
    are attended to with keys of zero.
    """

    patterns = ((r"(double|single)_stream_blocks\.\d+\.block\.attn1", "joint"),)
    block_outputs = ("hidden_states", "encoder_hidden_states")
    batches_prompts = True
    mixes_text = r"single_stream_blocks\..+"
    one_prompt = "its text comes from two encoders"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "hidream"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (1, 64, 64)  # 1024 pixels

    def timestep(self, call: ModelCall) -> Tensor | float | None:
        return call.arguments.get("timesteps")

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        latents, patch = call["hidden_states"], model.config.patch_size
        if latents.ndim != 4:
            raise LayoutUnknown("the latents come as patches, which do not tell their grid")
        _, height, width = image_grid(latents, patch)
        is_square = latents.shape[-2] == latents.shape[-1]
        filling = 0 if is_square else model.max_seq - height * width
        if filling < 0:
            raise LayoutUnknown(f"the model takes {model.max_seq} tokens of an image at most")
        text = call["encoder_hidden_states_t5"].shape[1]
        text += 2 * call["encoder_hidden_states_llama3"].shape[2]
        segments = (
            Segment("visual", height * width, (1, height, width)),
            Segment("condition", filling),
            Segment("text", text),
        )
        return TokenLayout(tuple(part for part in segments if part.length))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        t5, llama = config.caption_channels
        layers = max(config.llama_layers) + 1
        return {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timesteps": zeros(model, batch),
            "encoder_hidden_states_t5": zeros(model, batch, text, t5),
            "encoder_hidden_states_llama3": zeros(model, layers, batch, text, llama),
            "pooled_embeds": zeros(model, batch, config.text_emb_dim),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.pe_embedder

        def forward(ids: Tensor) -> Tensor:
            return rotations(ids, rope.axes_dim, rope.theta, axes).unsqueeze(2)

        return exchanged(rope, "forward", forward)
