"""Binding of MiniMax-H3."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, Binding, LayoutUnknown, ModelCall, zeros
from diffaccel.bindings.packed import last_run, packed_grids
from diffaccel.bindings.passed_tables import amplitudes, packed_angles, packed_rope
from diffaccel.layout import Grid, Segment, TokenLayout


class MiniMaxH3Binding(Binding):
    """MiniMax-H3: text, references, audio, and last the video to denoise.

    Tokens are scattered by index, and their positions tell the grid; both are read once for each
    tensor, one wait for the device in a run. Positions of rows and columns
    are shares of the picture; a scaling of them counts in tokens like all others.
    """

    patterns = ((r"transformer_blocks\.\d+\.attn", "joint"),)
    mixes_text = r"transformer_blocks\..+"
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "minimax-h3"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (37, 24, 42)  # 124 frames of 768 x 1344

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        places = call["position_ids"]
        text = len(call["text_indices"])
        words = call.read(call["text_indices"], last_run)
        _, heard = call.read(call["audio_indices"], last_run)
        start, end = call.read(call["video_indices"], last_run)
        if words != (0, text) or end != len(places):
            raise LayoutUnknown("the text does not come first, and the video last")
        if start not in (heard, text):
            raise LayoutUnknown("references and the video to denoise are not told apart")
        grids = call.read(places, lambda known: packed_grids(known[start:]))
        if len(grids) > 1:
            raise LayoutUnknown("the tokens of the video are not one grid")
        parts = (
            Segment("text", text),
            Segment("condition", start - text),
            Segment("visual", prod(grids[0]), grids[0]),
        )
        return TokenLayout(tuple(part for part in parts if part.length))

    def skip_reason(self, name: str) -> str:
        return "text token refiner" if "refiner" in name else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        sides = [side // patch for side, patch in zip(latents, config.patch_size, strict=True)]
        audio, video = 5 * latents[0], prod(sides)  # some 5 latents of the audio for one of these
        total = text + audio + video
        # On the CPU, as the layout is read from their values.
        places = torch.zeros(total, 3)
        places[-video:] = torch.cartesian_prod(*(torch.arange(float(side)) for side in sides))
        tags = torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor([text, audio, video]))
        channels = config.in_channels * prod(config.patch_size)
        return {
            "hidden_states": zeros(model, batch, video, channels),
            "audio_hidden_states": zeros(model, batch, audio, config.audio_in_channels),
            "encoder_hidden_states": zeros(model, batch, text, config.text_dim),
            "timestep": zeros(model, 1),
            "timestep_indices": torch.zeros(total, dtype=torch.long, device=model.device),
            "token_tags": tags.to(model.device),
            "position_ids": places,
            "text_indices": torch.arange(text),
            "audio_indices": torch.arange(text, text + audio),
            "video_indices": torch.arange(text + audio, total),
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.rope

        def waves(layout: TokenLayout, places: Tensor) -> tuple[Tensor, Tensor]:
            frequencies = (rope.inv_freq.to(places.device),) * 3
            found = torch.cat(packed_angles(places, frequencies, axes, layout), 1)
            factor = amplitudes(axes, places).repeat_interleave(len(rope.inv_freq))
            cosine, sine = (factor * wave for wave in (found.cos(), found.sin()))
            return torch.cat([cosine] * 2, 1).float(), torch.cat([sine] * 2, 1).float()

        return packed_rope(self, model, rope, waves)
