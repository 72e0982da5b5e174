"""Bindings of Wan 2.1 and 2.2, and of what descends from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    patched,
    told_native,
    zeros,
)
from diffaccel.bindings.tables import replaced, rescaled_waves
from diffaccel.layout import Grid, Segment, TokenLayout


class WanBinding(Binding):
    """Wan 2.1 and 2.2: self-attention over the video alone; text is cross-attended.

    Each transformer of Wan 2.2 A14B is a denoiser of its own.
    """

    patterns = ((r"blocks\.\d+\.attn1", "self"), (r"blocks\.\d+\.attn2", "cross"))
    text_length = 512
    fills_text_up = True
    scales_rope = True

    family_choices = ("wan2.1-t2v", "wan2.1-i2v", "wan2.2-t2v", "wan2.2-i2v", "wan2.2-ti2v")

    def family(self, model: Any, pipe: Any) -> str:
        settings = getattr(pipe, "config", {})
        config = model.config
        if settings.get("expand_timesteps") or config.out_channels == 48:
            return "wan2.2-ti2v"
        has_experts = getattr(pipe, "transformer_2", None) is not None
        version = "wan2.2" if has_experts or settings.get("boundary_ratio") else "wan2.1"
        # Image to video: the first frame comes as further input channels or as image tokens.
        is_i2v = config.image_dim is not None or config.in_channels > config.out_channels
        return f"{version}-{'i2v' if is_i2v else 't2v'}"

    def longest_text(self, model: Any) -> int | None:
        # What precedes the last 512 tokens counts as a picture's.
        return None if model.config.image_dim is None else self.text_length

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        told = told_native(model)
        if told is not None:
            return told
        if model.config.out_channels == 48:
            return (31, 22, 40)  # 121 frames of 704 x 1280, each token 32 x 32 pixels
        is_large = model.config.num_attention_heads >= 40
        return (21, 45, 80) if is_large else (21, 30, 52)  # 81 frames, 720 or 480 rows

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        sizes = call["hidden_states"].shape[-3:]
        return TokenLayout.video(*map(patched, sizes, model.config.patch_size))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        call = {
            "hidden_states": zeros(model, batch, config.in_channels, *latents),
            "timestep": zeros(model, batch),
            "encoder_hidden_states": zeros(model, batch, text, config.text_dim),
        }
        if config.get("image_dim") is not None:
            # CLIP of pictures of 224 x 224; with positions, of a first and a last frame.
            pictures = batch * (1 if config.pos_embed_seq_len is None else 2)
            call["encoder_hidden_states_image"] = zeros(model, pictures, 257, config.image_dim)
        return call

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the tables (positions, D): cosines and sines of all axes side by side.
        rope = model.rope
        tables = rope.freqs_cos, rope.freqs_sin
        places = [torch.arange(len(tables[0]), device=tables[0].device)] * 3
        dims = _axes_dims(rope.attention_head_dim)
        cosine, sine = rescaled_waves(tables, places, dims, 10_000.0, axes)
        with replaced(rope, freqs_cos=cosine, freqs_sin=sine):
            yield


class WanVACEBinding(WanBinding):
    """Wan VACE: the video alone, its reference images being its first frames.

    The control blocks, which run first, are left as they are: what they return is scaled and added
    to the video in every step.
    """

    is_chain = False

    def family(self, model: Any, pipe: Any) -> str:
        return "wan-vace"

    def skip_reason(self, name: str) -> str:
        is_control = name.startswith("vace_blocks")
        return "control block" if is_control else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        control = zeros(model, batch, model.config.vace_in_channels, *latents)
        call = super().example_call(model, latents, text, batch)
        return call | {"control_hidden_states": control}


class WanAnimateBinding(WanBinding):
    """Wan 2.2 Animate: the video, whose first frame is the picture of the character."""

    is_chain = False  # the face adapters stand between the blocks

    def family(self, model: Any, pipe: Any) -> str:
        return "wan-animate"

    def skip_reason(self, name: str) -> str:
        is_face = name.startswith("face_adapter")
        return "cross-attention to the face" if is_face else super().skip_reason(name)

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        frames, height, width = latents
        size = config.motion_encoder_size
        call = super().example_call(model, latents, text, batch)
        return call | {
            "pose_hidden_states": zeros(
                model, batch, config.latent_channels, frames - 1, height, width
            ),
            "face_pixel_values": zeros(model, batch, 3, 4 * (frames - 2) + 1, size, size),
        }


class SkyReelsV2Binding(WanBinding):
    """SkyReels V2: the video alone, whole or, in diffusion forcing, a window of it."""

    def family(self, model: Any, pipe: Any) -> str:
        return "skyreels-v2"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (25, 34, 60)  # 97 frames of 544 x 960

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        layout = super().layout(model, call, layer)
        block = model.config.num_frame_per_block
        if 1 < block < layout.grid[0]:
            raise LayoutUnknown(f"frames attend causally, in blocks of {block}")
        return layout


class ChronoEditBinding(WanBinding):
    """ChronoEdit: a short video from the picture to edit, its first frame, to the edited one."""

    def family(self, model: Any, pipe: Any) -> str:
        return "chronoedit"

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (8, 45, 80)  # 29 frames of 720 x 1280


class AnyFlowBinding(WanBinding):
    """AnyFlow: the video alone; latents are (B, F, C, H, W), each frame with its own timestep."""

    batches_prompts = True

    def family(self, model: Any, pipe: Any) -> str:
        return "anyflow"

    def longest_text(self, model: Any) -> int | None:
        return None

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        return told_native(model) or (21, 30, 52)  # 81 frames of 480 x 832

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        _, frames, _, height, width = call["hidden_states"].shape
        return TokenLayout.video(*map(patched, (frames, height, width), model.config.patch_size))

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        frames, height, width = latents
        call = super().example_call(model, latents, text, batch)
        return call | {
            "hidden_states": zeros(model, batch, frames, model.config.in_channels, height, width),
            "timestep": zeros(model, batch, frames),
            "r_timestep": zeros(model, batch, frames),
        }

    @contextmanager
    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> Iterator[None]:
        # Exchanges the function that builds the complex table (positions, D / 2) on a device.
        rope = model.rope
        plain = rope._build_freqs
        dims = _axes_dims(rope.attention_head_dim)

        def scaled(device: torch.device) -> Tensor:
            table = plain(device)
            both = [part.repeat_interleave(2, 1) for part in (table.real, table.imag)]
            places = [torch.arange(len(table), device=table.device)] * 3
            cosine, sine = rescaled_waves(both, places, dims, rope.theta, axes)
            return torch.complex(cosine[:, ::2].to(table.real), sine[:, ::2].to(table.real))

        with replaced(rope, _build_freqs=scaled):
            yield


class AnyFlowFARBinding(AnyFlowBinding):
    """AnyFlow FAR: the frames of one chunk after what is kept of earlier ones, then padding.

    The padding to a multiple of 128 is attended to. Calls that keep a chunk for later ones, and
    whole videos without a cache, are causal.
    """

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        flags = call.arguments.get("kv_cache_flag") or {"is_cache_step": True}
        if call.arguments.get("kv_cache") is None or flags["is_cache_step"]:
            raise LayoutUnknown("chunks of frames attend causally")
        config, chunks = model.config, call["chunk_partition"]
        video = super().layout(model, call, layer)
        height, width = call["hidden_states"].shape[-2:]
        _, rows, columns = config.compressed_patch_size
        cached = flags["num_cached_chunks"]
        coarse = max(cached + 1 - config.full_chunk_limit, 0)
        before = sum(chunks[:coarse]) * (height // rows) * (width // columns)
        before += sum(chunks[coarse:cached]) * video.grid[1] * video.grid[2]
        rest = Segment("condition", -video.length % 128)
        return TokenLayout((Segment("condition", before), video.visual, rest))

    def predicts(self, call: ModelCall) -> bool:
        return not (call.arguments.get("kv_cache_flag") or {}).get("is_cache_step")

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        config = model.config
        empty = zeros(model, 2, batch, config.num_attention_heads, 0, config.attention_head_dim)
        cache = {"full_cache": empty, "compressed_cache": empty}
        return super().example_call(model, latents, text, batch) | {
            "chunk_partition": [latents[0]],
            "kv_cache": [cache] * config.num_layers,
            "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": False},
        }


def _axes_dims(head_dim: int) -> tuple[int, int, int]:
    """Returns how many columns of the rotary tables belong to frames, rows and columns."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side
