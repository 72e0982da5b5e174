"""LTX-Video and what descends from it: a packed video, text cross-attended."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, lengths, noise


def coordinates(frames: list[float], height: int, width: int) -> torch.Tensor:
    """Frame (in seconds), row and column (in pixels) of each token, (2, 3, N)."""
    axes = (torch.tensor(frames), torch.arange(height) * 32.0, torch.arange(width) * 32.0)
    return torch.cartesian_prod(*axes).T.repeat(2, 1, 1)


def ltx(before: int = 0, after: int = 0) -> TinyModel:
    """LTX-Video: two blocks, text of two lengths; frames that condition, before or after."""
    model = built(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=32,
    )  # fmt: skip
    grid: dict = {"num_frames": 3, "height": 5, "width": 9, "rope_interpolation_scale": (0.32, 32, 32)}
    if before:  # LTXConditionPipeline: frames at a later time
        coords = [coordinates([0.8, 1.1], 5, 9)[..., : 45 * before], coordinates([0, 0.04, 0.36], 5, 9)]
        grid = {"video_coords": torch.cat(coords, -1)}
    if after:  # LTXI2VLongMultiPromptPipeline: the numbers say nothing; times begin anew
        coords = [coordinates([0, 0.3, 0.6], 5, 9), coordinates([0, 0.3], 5, 9)[..., : 45 * after]]
        grid = {"num_frames": 1, "height": 1, "width": 1, "video_coords": torch.cat(coords, -1)}
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
        origin=(int(before > 0), 0, 0), angle_error=5e-3,
    )  # fmt: skip


def ltx2(rope: str = "interleaved", keyframes: int = 0, with_audio: bool = False) -> TinyModel:
    """LTX-2: two blocks; both ways to rotate; the second is version 2.3, with gates."""
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
        base = model.rope.prepare_video_coords(2, 3, 5, 9, "cpu")
        later = model.rope.prepare_video_coords(2, keyframes, 5, 9, "cpu")
        grid["video_coords"] = torch.cat([base, later], 2)
        parts.append(Segment("condition", 45 * keyframes, (keyframes, 5, 9)))
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
        angle_error=5e-3, origin=(1, 0, 0),  # the first frame is shorter than the others
    )  # fmt: skip


MODELS = {
    "LTXVideoTransformer3DModel": ltx,
    "LTXVideoTransformer3DModel:condition": lambda: ltx(before=2),
    "LTXVideoTransformer3DModel:tail": lambda: ltx(after=2),
    "LTX2VideoTransformer3DModel": ltx2,
    "LTX2VideoTransformer3DModel:split": lambda: ltx2("split"),
    "LTX2VideoTransformer3DModel:keyframes": lambda: ltx2(keyframes=2),
    "LTX2VideoTransformer3DModel:audio": lambda: ltx2(with_audio=True),
}
