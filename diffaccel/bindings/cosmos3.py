"""Binding of Cosmos 3."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import AttentionLayer, Binding, LayoutUnknown, ModelCall, zeros
from diffaccel.bindings.packed import last_run
from diffaccel.bindings.passed_tables import amplitudes, packed_angles, packed_rope
from diffaccel.layout import Grid, Segment, TokenLayout


class Cosmos3Binding(Binding):
    """Cosmos 3: text, control videos, the video to denoise, sound, actions.

    Text attends to itself in a call of its own; all others attend to everything. The indices that
    scatter the tokens are read once for each tensor.
    """

    patterns = ((r"layers\.\d+\.self_attn", "joint"),)
    block_outputs = ("und_seq", "gen_seq")
    latents = "vision_tokens"
    unguided = "its videos and predictions come in lists"
    attends_text_apart = True
    scales_rope = True

    def family(self, model: Any, pipe: Any) -> str:
        return "cosmos3"

    def timestep(self, call: ModelCall) -> Any:
        return call.arguments.get("vision_timesteps")

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return (48, 23, 40)  # 189 frames of 720 x 1280, each token 32 x 32 pixels

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        text, places = call["und_len"], call["vision_sequence_indexes"]
        grids = [tuple(grid) for grid in call["vision_token_shapes"]]
        noisy = [index for index, frames in enumerate(call["vision_noisy_frame_indexes"])
                 if len(frames)]  # fmt: skip
        if len(noisy) != 1:
            raise LayoutUnknown(f"{len(noisy)} videos are denoised in one sequence, not one")
        tokens = sum(map(prod, grids))
        if call.read(places, last_run) != (text, text + tokens) or len(places) != tokens:
            raise LayoutUnknown("the videos do not follow the text one after the other")
        videos = [
            Segment("visual" if index == noisy[0] else "condition", prod(grid), grid)
            for index, grid in enumerate(grids)
        ]
        after = Segment("condition", call["sequence_length"] - text - tokens)
        parts = (Segment("text", text), *videos, after)
        return TokenLayout(tuple(part for part in parts if part.length))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        # The model takes one sample at a time.
        frames, *sides = latents
        patch = model.config.latent_patch_size
        grid = (frames, *(-(-side // patch) for side in sides))
        tokens = prod(grid)
        # On the CPU, as the layout is read from their values.
        places = torch.arange(text, text + tokens)
        return {
            "input_ids": torch.zeros(text, dtype=torch.long, device=model.device),
            "text_indexes": torch.arange(text),
            "position_ids": zeros(model, 3, text + tokens),
            "und_len": text,
            "sequence_length": text + tokens,
            "vision_tokens": [zeros(model, 1, model.config.latent_channel, *latents)],
            "vision_token_shapes": [grid],
            "vision_sequence_indexes": places,
            "vision_mse_loss_indexes": places,
            "vision_timesteps": zeros(model, tokens),
            "vision_noisy_frame_indexes": [torch.arange(frames, device=model.device)],
        }

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        rope = model.rotary_emb
        count = len(rope.inv_freq)
        # Frequencies go to frames, rows and columns in turn, and to frames when these have enough.
        kinds = torch.zeros(count, dtype=torch.long)
        for number in (1, 2):
            kinds[number : 3 * rope.rope_axes_dim[number] : 3] = number
        places_of = [(kinds == number).nonzero().flatten() for number in range(3)]

        def waves(
            layout: TokenLayout, position_ids: Tensor, device: Any, dtype: torch.dtype
        ) -> tuple[Tensor, Tensor]:
            places = position_ids.reshape(-1, position_ids.shape[-1]).expand(3, -1).T
            own = rope.inv_freq.to(places.device)
            found = places.new_empty(len(places), count, dtype=torch.float64)
            frequencies = [own[columns] for columns in places_of]
            for columns, angle in zip(
                places_of, packed_angles(places, frequencies, axes, layout), strict=True
            ):
                found[:, columns] = angle
            factor = amplitudes(axes, places)[kinds]
            cosine, sine = (
                torch.cat([factor * wave] * 2, 1).to(device, dtype)[None]
                for wave in (found.cos(), found.sin())
            )
            return cosine, sine

        return packed_rope(self, model, rope, waves)
