"""LTX-Video and what descends from it: a packed video, text cross-attended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import (
    build_video_coords_for_window,
)

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise

PATCHES: Any = SimpleNamespace(
    transformer_temporal_patch_size=1, transformer_spatial_patch_size=1,
    vae_temporal_compression_ratio=8, vae_spatial_compression_ratio=32,
)  # fmt: skip
"""What the pipelines of LTX-2 ask themselves for when they number tokens."""


def condition_ids(frames: int, frame_index: int) -> torch.Tensor:
    """Positions of frames of 5 x 9 tokens, as LTXConditionPipeline numbers them."""
    pipe = LTXConditionPipeline
    ids = pipe._scale_video_ids(pipe._prepare_video_ids(2, frames, 5, 9), 32, 8, frame_index)
    return ids.float() * torch.tensor([1 / 25, 1.0, 1.0])[:, None]


def ltx(before: int = 0, after: int = 0) -> TinyModel:
    """LTX-Video: two blocks, text of two lengths; frames that condition, before or after.

    `before` as LTXConditionPipeline packs them, `after` as the one for long videos does.
    """
    model = built(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=32,
    )  # fmt: skip
    grid: dict = {
        "num_frames": 3,
        "height": 5,
        "width": 9,
        "rope_interpolation_scale": (0.32, 32, 32),
    }
    if before:
        coords = torch.cat([condition_ids(before, 16), condition_ids(3, 0)], -1)
        grid = {"video_coords": coords}
    if after:
        coords = build_video_coords_for_window(
            torch.zeros(2, 8, 3 + after, 5, 9), after, 0, 0, (8, 32, 32), 25
        )
        grid = {"num_frames": 1, "height": 1, "width": 1, "video_coords": coords}
    parts = [Segment("condition", 45 * before, (before, 5, 9))] if before else []
    parts.append(Segment("visual", 135, (3, 5, 9)))
    parts += [Segment("condition", 45 * after, (after, 5, 9))] if after else []
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 135 + 45 * (before + after), 8),
            "timestep": noise(2, seed=4), "encoder_hidden_states": noise(2, 6, 32, seed=2),
            "encoder_attention_mask": lengths(6, 6, 4), **grid,
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout(tuple(parts))},
        grid=(3, 5, 9), start=45 * before, skipped=2, latent_size=(3, 5, 9), text=6,
        wave_error=5e-3,
        origin=(int(before + after > 0), 0, 0),  # the first frame is shorter than the others
    )  # fmt: skip


def ltx2(
    rope: str = "interleaved", keyframes: int = 0, with_audio: bool = False, told: bool = True
) -> TinyModel:
    """LTX-2: two blocks; both ways to rotate; the second is version 2.3, with gates.

    The keyframe of the last frame continues the video to denoise, if it were not for its length.
    """
    is_newer = rope == "split"
    model = built(
        diffusers.LTX2VideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=2,
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=16,
        rope_type=rope, gated_attn=is_newer, cross_attn_mod=is_newer, audio_gated_attn=is_newer,
        audio_cross_attn_mod=is_newer, perturbed_attn=is_newer, use_prompt_embeddings=not is_newer,
    )  # fmt: skip
    widths = (24, 16) if is_newer else (16, 16)
    grid: dict = {"num_frames": 3, "height": 5, "width": 9}
    parts = [Segment("visual", 135, (3, 5, 9))]
    if keyframes:
        dfr = pytest.importorskip(
            "diffusers.pipelines.ltx2.pipeline_ltx2_dfr", exc_type=ImportError,
            reason="keyframes of LTX-2 need a transformers with Gemma 4",
        )  # fmt: skip
        base = model.rope.prepare_video_coords(2, 3, 5, 9, "cpu")
        later = [
            dfr.LTX2DFRPipeline._prepare_keyframe_coords(PATCHES, 1, 5, 9, 16 - at, 1, 24.0, "cpu")
            for at in range(keyframes)
        ]
        grid["video_coords"] = torch.cat([base, *(x.expand(2, -1, -1, -1) for x in later)], 2)
        if told:
            parts.append(Segment("condition", 45 * keyframes))
        else:
            parts += [Segment("condition", 45, (1, 5, 9))] * keyframes
            grid = {"video_coords": grid["video_coords"]}
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 135 + 45 * keyframes, 8),
            "audio_hidden_states": noise(2, 20, 4, seed=5), "timestep": noise(2, seed=4),
            "sigma": noise(2, seed=4), "encoder_hidden_states": noise(2, 6, widths[0], seed=2),
            "audio_encoder_hidden_states": noise(2, 6, widths[1], seed=3),
            "encoder_attention_mask": lengths(6, 6, 4).float(),
            "audio_encoder_attention_mask": lengths(6, 6, 4).float(),
            "audio_num_frames": 20, "isolate_modalities": not with_audio, **grid,
        },
        layouts={r"transformer_blocks\.\d\.attn1": TokenLayout(tuple(parts))},
        grid=(3, 5, 9), skipped=10, latent_size=(3, 5, 9), text=6, is_local=not with_audio,
        wave_error=5e-3, origin=(1, 0, 0),  # the first frame is shorter than the others
    )  # fmt: skip


MODELS = {
    "LTXVideoTransformer3DModel": ltx,
    "LTXVideoTransformer3DModel:condition": lambda: ltx(before=2),
    "LTXVideoTransformer3DModel:tail": lambda: ltx(after=2),
    "LTX2VideoTransformer3DModel": ltx2,
    "LTX2VideoTransformer3DModel:split": lambda: ltx2("split"),
    "LTX2VideoTransformer3DModel:keyframes": lambda: ltx2(keyframes=2),
    "LTX2VideoTransformer3DModel:dfr": lambda: ltx2(keyframes=2, told=False),
    "LTX2VideoTransformer3DModel:audio": lambda: ltx2(with_audio=True),
}
