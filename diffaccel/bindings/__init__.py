"""Bindings: one per model family, and the table that finds them."""

from __future__ import annotations

from torch import nn

from diffaccel.bindings.allegro import AllegroBinding
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    UnsupportedModelError,
    processor_modules,
    set_processor,
)
from diffaccel.bindings.cogvideox import CogVideoXBinding, ConsisIDBinding
from diffaccel.bindings.cosmos import CosmosBinding
from diffaccel.bindings.cosmos3 import Cosmos3Binding
from diffaccel.bindings.easyanimate import EasyAnimateBinding
from diffaccel.bindings.flux import FluxBinding
from diffaccel.bindings.hunyuan_video import HunyuanVideoBinding
from diffaccel.bindings.latte import LatteBinding
from diffaccel.bindings.ltx import LTX2VideoBinding, LTXVideoBinding
from diffaccel.bindings.minimax_h3 import MiniMaxH3Binding
from diffaccel.bindings.mochi import MochiBinding
from diffaccel.bindings.qwen_image import QwenImageBinding
from diffaccel.bindings.sd3 import SD3Binding
from diffaccel.bindings.stable_cascade import StableCascadeBinding
from diffaccel.bindings.unet import ControlNetXSBinding, UNetBinding
from diffaccel.bindings.video_unet import (
    AnimateDiffBinding,
    I2VGenXLBinding,
    ModelScopeBinding,
    StableVideoBinding,
)
from diffaccel.bindings.wan import WanBinding

__all__ = [
    "BINDINGS",
    "AttentionLayer",
    "Binding",
    "LayoutUnknown",
    "ModelCall",
    "UnsupportedModelError",
    "binding_of",
    "processor_modules",
    "set_processor",
]

BINDINGS: dict[str, Binding] = {
    "FluxTransformer2DModel": FluxBinding(),
    "SD3Transformer2DModel": SD3Binding(),
    "QwenImageTransformer2DModel": QwenImageBinding(),
    "WanTransformer3DModel": WanBinding(),
    "HunyuanVideoTransformer3DModel": HunyuanVideoBinding(),
    "CogVideoXTransformer3DModel": CogVideoXBinding(),
    "LTXVideoTransformer3DModel": LTXVideoBinding(),
    "UNet2DConditionModel": UNetBinding(),
    "LTX2VideoTransformer3DModel": LTX2VideoBinding(),
    "CosmosTransformer3DModel": CosmosBinding(),
    "MochiTransformer3DModel": MochiBinding(),
    "EasyAnimateTransformer3DModel": EasyAnimateBinding(),
    "AllegroTransformer3DModel": AllegroBinding(),
    "LatteTransformer3DModel": LatteBinding(),
    "ConsisIDTransformer3DModel": ConsisIDBinding(),
    "UNetMotionModel": AnimateDiffBinding(),
    "UNetSpatioTemporalConditionModel": StableVideoBinding(),
    "UNet3DConditionModel": ModelScopeBinding(),
    "I2VGenXLUNet": I2VGenXLBinding(),
    "StableCascadeUNet": StableCascadeBinding(),
    "UNetControlNetXSModel": ControlNetXSBinding(),
    "Cosmos3OmniTransformer": Cosmos3Binding(),
    "MiniMaxH3Transformer3DModel": MiniMaxH3Binding(),
}
"""Denoiser class name -> binding. Names, so that no model code is imported."""


def binding_of(model: nn.Module) -> Binding:
    """Returns the binding of a denoiser or of the first class it inherits from that has one."""
    for model_class in type(model).__mro__:
        if model_class.__name__ in BINDINGS:
            return BINDINGS[model_class.__name__]
    raise UnsupportedModelError(
        f"no binding knows the attention of {type(model).__name__}; "
        f"supported denoisers are {', '.join(BINDINGS)}"
    )
