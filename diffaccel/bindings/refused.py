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
    "UNetFlatConditionModel": "it denoises embeddings of text, not visual tokens",
    "WuerstchenDiffNeXt": "diffusers has deprecated it, Stable Cascade is its successor",
    "WuerstchenPrior": "diffusers has deprecated it, Stable Cascade is its successor",
    "SanaTransformer2DModel": "its self-attention is linear; all its softmax is cross-attention",
    "SanaVideoTransformer3DModel": "its self-attention is linear; all its softmax is "
    "cross-attention",
    "SanaWMTransformer3DModel": "three of four blocks are recurrent, the others attend in modules "
    "without a processor",
    "WanAnimate2Transformer3DModel": "every denoising step attends by a block mask of its own",
    "Kandinsky6SRTransformer3DModel": "it always attends by a block mask of its own (NABLA)",
    "UniDiffuserModel": "its learned positions are for one size of about 1,100 tokens",
    "LTX2VideoDiffusionDecoderModel": "it decodes, by neighborhood attention of its own",
    "UNet2DModel": "it draws pixels without a text, and few of its levels attend",
    "RFD4ProteinaTransformer": "it denoises proteins, which have no grid of visual tokens",
}
"""Class name -> what it is instead, to follow "no method serves this class: "."""
