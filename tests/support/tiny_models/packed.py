"""Models whose tokens of all kinds are scattered into one sequence by index."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from diffaccel.layout import Segment, TokenLayout
from tiny_models.base import TinyModel, built, noise

VISUAL = Segment("visual", 135, (3, 5, 9))


def cosmos3(controls: int = 0, sounds: int = 0) -> TinyModel:
    """Cosmos 3: two layers, heads in groups, a first frame that conditions; controls, sound."""
    model = built(
        diffusers.Cosmos3OmniTransformer, hidden_size=16, intermediate_size=16, head_dim=12,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, latent_channel=4,
        latent_patch_size=2, patch_latent_dim=16, vocab_size=32, rope_axes_dim=(2, 2, 2),
        sound_gen=sounds > 0, sound_dim=3,
    )  # fmt: skip
    text, tokens = 6, 45 * controls + 135
    places = torch.arange(text, text + tokens)
    total = text + tokens + sounds
    arguments: dict[str, Any] = {
        "input_ids": torch.arange(text), "text_indexes": torch.arange(text), "und_len": text,
        "position_ids": cosmos3_places(text, controls, sounds), "sequence_length": total,
        "vision_tokens": [noise(1, 4, controls, 10, 18, seed=3)] * bool(controls)
        + [noise(1, 4, 3, 10, 18)],
        "vision_token_shapes": [(controls, 5, 9)] * bool(controls) + [(3, 5, 9)],
        "vision_sequence_indexes": places, "vision_mse_loss_indexes": places[-90:],
        "vision_timesteps": torch.full((90,), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(0)] * bool(controls) + [torch.tensor([1, 2])],
    }  # fmt: skip
    if sounds:
        heard = torch.arange(total - sounds, total)
        arguments |= {
            "sound_tokens": [noise(3, sounds, seed=4)], "sound_token_shapes": [(sounds, 1, 1)],
            "sound_sequence_indexes": heard, "sound_mse_loss_indexes": heard,
            "sound_timesteps": torch.full((sounds,), 700.0),
            "sound_noisy_frame_indexes": [torch.arange(sounds)],
        }  # fmt: skip
    parts = [Segment("text", text), VISUAL]
    if controls:
        parts.insert(1, Segment("condition", 45 * controls, (controls, 5, 9)))
    if sounds:
        parts.append(Segment("condition", sounds))
    return TinyModel(
        model, arguments, layouts={r"layers\.\d\.self_attn": TokenLayout(tuple(parts))},
        grid=(3, 5, 9), latents="vision_tokens", axes="bcfhw", batch=1,
        latent_size=(3, 10, 18), text=text,
    )  # fmt: skip


def cosmos3_places(text: int, controls: int, sounds: int) -> Tensor:
    """Returns positions (3, N) as the pipeline makes them: videos and sound start together."""
    words, heard = torch.arange(float(text)).expand(3, -1), torch.zeros(3, sounds)
    heard[0] = 40 + 1.3 * torch.arange(sounds)
    videos = [
        torch.cartesian_prod(
            40 + 1.5 * torch.arange(frames), torch.arange(5.0), torch.arange(9.0)
        ).T
        for frames in [controls] * bool(controls) + [3]
    ]
    return torch.cat([words, *videos, heard], 1)


def minimax_h3(references: bool = False) -> TinyModel:
    """MiniMax-H3: two blocks; a reference picture with the sound of its own before the audio."""
    model = built(
        diffusers.MiniMaxH3Transformer3DModel, num_attention_heads=2, attention_head_dim=12,
        hidden_size=16, num_layers=2, num_refiner_layers=1, ffn_dim=16, in_channels=4,
        audio_in_channels=3, text_dim=8, freq_dim=8, time_embed_hidden_dim=8, time_embed_dim=8,
        rope_freq_dim=2,
    )  # fmt: skip
    text, pictures, audio = 6, 12 * references, 8
    start = text + pictures + audio
    places = torch.zeros(start + 135, 3, dtype=torch.float64)
    places[:text, 0] = torch.arange(text)
    if references:
        sides = torch.arange(3.0), torch.arange(4.0)
        places[text : text + 12] = torch.cartesian_prod(torch.tensor([6.0]), *sides)
    places[text + pictures : start, 0] = 7 + torch.arange(audio)
    # The first frame may be shorter than the others.
    times = 7.0 + torch.tensor([0.0, 1.7, 8.3] if references else [0.0, 6.6, 13.2])
    places[start:] = torch.cartesian_prod(times, torch.arange(5) * 3.2, torch.arange(9) * 3.2)
    video = torch.arange(start, start + 135)
    if references:
        video = torch.cat([torch.arange(text, text + 12), video])
    tags = torch.full((start + 135,), 2)
    tags[video], tags[:text] = 0, 1
    parts = [Segment("text", text), Segment("condition", pictures + audio), VISUAL]
    return TinyModel(
        model,
        {
            "hidden_states": noise(2, pictures + 135, 16),
            "audio_hidden_states": noise(2, audio, 3, seed=2),
            "encoder_hidden_states": noise(2, text, 8, seed=3),
            "timestep": torch.tensor([0.3, 0.9]), "timestep_indices": (tags == 1).long(),
            "token_tags": tags, "position_ids": places, "video_indices": video,
            "audio_indices": torch.arange(text + pictures, start),
            "text_indices": torch.arange(text),
        },
        layouts={r"transformer_blocks\.\d\.attn": TokenLayout(tuple(parts))},
        grid=(3, 5, 9), start=pictures, skipped=1, latent_size=(3, 10, 18), text=text,
        origin=(int(references), 0, 0),  # its frames are not evenly spaced
    )  # fmt: skip


MODELS = {
    "Cosmos3OmniTransformer": cosmos3,
    "Cosmos3OmniTransformer:controls": lambda: cosmos3(controls=1),
    "Cosmos3OmniTransformer:sound": lambda: cosmos3(sounds=4),
    "MiniMaxH3Transformer3DModel": minimax_h3,
    "MiniMaxH3Transformer3DModel:references": lambda: minimax_h3(references=True),
}
