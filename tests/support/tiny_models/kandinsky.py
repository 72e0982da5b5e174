"""Kandinsky 5 and 6: a video (B, F, H, W, C) whose text is cross-attended."""

from __future__ import annotations

import diffusers
import torch

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import Builder, TinyModel, built, lengths, noise

SMALL = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
    "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}  # fmt: skip


def places(*axes: list[int]) -> tuple[torch.Tensor, ...]:
    """Rotary positions of each axis."""
    return tuple(torch.tensor(axis) for axis in axes)


def kandinsky5() -> TinyModel:
    """Kandinsky 5: two blocks, the first frame in further channels."""
    model = built(diffusers.Kandinsky5Transformer3DModel, **SMALL, visual_cond=True)
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, 3, 10, 18, 9), "timestep": noise(2, seed=4),
            "encoder_hidden_states": noise(2, 6, 16, seed=2),
            "pooled_projections": noise(2, 8, seed=3),
            "visual_rope_pos": places([*range(3)], [*range(5)], [*range(9)]),
            "text_rope_pos": torch.arange(6),
        },
        layouts={r"visual_transformer_blocks\.\d\.self_attention": TokenLayout.video(3, 5, 9)},
        grid=(3, 5, 9), axes="bfhwc", skipped=3, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


def kandinsky6(sound: bool = False, reference: bool = False) -> TinyModel:
    """Kandinsky 6: two blocks; sound beside the video, a reference picture behind it."""
    model = built(
        diffusers.Kandinsky6Transformer3DModel, **SMALL, in_audio_dim=4, out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(2, 3 + reference, 10, 18, 9), "timestep": noise(2, seed=4),
        "encoder_hidden_states": noise(2, 6, 16, seed=2),
        "pooled_projections": noise(2, 8, seed=3),
        "encoder_attention_mask": lengths(6, 6, 4),
    }  # fmt: skip
    segments = [Segment("visual", 135, (3, 5, 9))]
    if sound:
        arguments["audio_hidden_states"] = noise(2, 8, 4, seed=5)
    if reference:
        segments.append(Segment("condition", 45, (1, 5, 9)))
        arguments["visual_rope_pos"] = places([0, 1, 2, 0], [*range(5)], [*range(9)])
        arguments["visual_token_type_ids"] = torch.tensor([[0, 0, 0, 1]] * 2)
    video = r"visual_transformer_blocks\.\d\.video_dec_block\.self_attention"
    return TinyModel(
        model, arguments, layouts={video: TokenLayout(tuple(segments))}, grid=(3, 5, 9),
        axes="bfhwc", skipped=2 * 5 + 2, is_local=not sound, latent_size=(3, 10, 18), text=6,
    )  # fmt: skip


MODELS: dict[str, Builder] = {
    "Kandinsky5Transformer3DModel": kandinsky5,
    "Kandinsky6Transformer3DModel": kandinsky6,
    "Kandinsky6Transformer3DModel:sound": lambda: kandinsky6(sound=True),
    "Kandinsky6Transformer3DModel:reference": lambda: kandinsky6(sound=True, reference=True),
}
