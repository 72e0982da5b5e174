"""One run of a stock pipeline of clips: frames, and the sound that some models make with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffaccel.bindings.exchange import exchanged


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """What a run makes.

    Attributes:
        frames: (B, F, 3, height, width) fp32 in [0, 1].
        audio: The sound (B, channels, samples), None where the model makes none.
        sound: Its latents (B, C, L, M) as its autoencoder decodes them, from which another run
            can start.
    """

    frames: Tensor
    audio: Tensor | None = None
    sound: Tensor | None = None


def run_clip(pipe: Any, call: dict[str, Any]) -> Clip:
    """Calls a stock pipeline of clips with all arguments but for what it returns."""
    with _decoded_sounds(pipe) as sounds:
        output = pipe(**call, output_type="pt")
    audio = getattr(output, "audio", None)
    return Clip(
        output.frames.float().cpu(), None if audio is None else audio.float().cpu(),
        sounds[-1] if sounds else None,
    )  # fmt: skip


@contextmanager
def _decoded_sounds(pipe: Any) -> Iterator[list[Tensor]]:
    """Collects what the autoencoder of the sound decodes, where a pipeline has one."""
    sounds: list[Tensor] = []
    vae = getattr(pipe, "audio_vae", None)
    if vae is None:
        yield sounds
        return
    decode = vae.decode

    def keep(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        sounds.append(latents)
        return decode(latents, *args, **kwargs)

    with exchanged(vae, "decode", keep):
        yield sounds
