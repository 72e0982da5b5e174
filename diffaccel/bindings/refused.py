"""Denoiser classes of diffusers that no method serves, each with its reason."""

from __future__ import annotations

_AUDIO = "it denoises sound, which has no grid of visual tokens"
_PRIOR = "it denoises one embedding for each picture, not visual tokens"

REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": _AUDIO,
    "AudioLDM2UNet2DConditionModel": _AUDIO,
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "UNet1DModel": _AUDIO,
    "PriorTransformer": _PRIOR,
    "RFD4ProteinaTransformer": "it denoises proteins, which have no grid of visual tokens",
}
"""Class name -> what it is instead, to follow "no method serves this class: "."""
