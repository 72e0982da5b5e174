"""Bindings: one per model family, and the table that finds them."""

from __future__ import annotations

from torch import nn

from diffaccel.bindings.allegro import AllegroBinding
from diffaccel.bindings.auraflow import AuraFlowBinding
from diffaccel.bindings.base import (
    AttentionLayer,
    Binding,
    LayoutUnknown,
    ModelCall,
    UnsupportedModelError,
    processor_modules,
    set_processor,
)
from diffaccel.bindings.bria import BriaBinding, BriaFibo2Binding, BriaFiboBinding
from diffaccel.bindings.cogvideox import CogVideoXBinding, ConsisIDBinding
from diffaccel.bindings.cogview import CogView3PlusBinding, CogView4Binding
from diffaccel.bindings.cosmos import CosmosBinding
from diffaccel.bindings.cosmos3 import Cosmos3Binding
from diffaccel.bindings.discrete import Transformer2DBinding, UVitBinding
from diffaccel.bindings.dit import DiTBinding, HunyuanDiTBinding, PixArtBinding
from diffaccel.bindings.easyanimate import EasyAnimateBinding
from diffaccel.bindings.ernie_image import ErnieImageBinding
from diffaccel.bindings.flux import (
    ChromaBinding,
    Flux2Binding,
    Flux3Binding,
    FluxBinding,
    Krea2Binding,
    LongCatImageBinding,
)
from diffaccel.bindings.glm_image import GlmImageBinding
from diffaccel.bindings.helios import HeliosBinding
from diffaccel.bindings.hidream import HiDreamBinding
from diffaccel.bindings.hunyuan_image import HunyuanImageBinding
from diffaccel.bindings.hunyuan_video import (
    FramepackBinding,
    HunyuanVideo15Binding,
    HunyuanVideoBinding,
    MotifVideoBinding,
)
from diffaccel.bindings.ideogram import IdeogramBinding
from diffaccel.bindings.joy_image import JoyImageEditBinding, JoyImageEditPlusBinding
from diffaccel.bindings.kandinsky import Kandinsky5Binding, Kandinsky6Binding
from diffaccel.bindings.kandinsky3 import Kandinsky3Binding
from diffaccel.bindings.latte import LatteBinding
from diffaccel.bindings.ltx import LTX2VideoBinding, LTXVideoBinding
from diffaccel.bindings.lumina import Lumina2Binding, LuminaNextBinding
from diffaccel.bindings.minimax_h3 import MiniMaxH3Binding
from diffaccel.bindings.mochi import MochiBinding
from diffaccel.bindings.nucleus import NucleusBinding
from diffaccel.bindings.omnigen import OmniGenBinding
from diffaccel.bindings.prx import PRXBinding
from diffaccel.bindings.qwen_image import QwenImageBinding
from diffaccel.bindings.qwen_image21 import QwenImage21Binding
from diffaccel.bindings.refused import REFUSED
from diffaccel.bindings.sd3 import SD3Binding
from diffaccel.bindings.stable_cascade import StableCascadeBinding
from diffaccel.bindings.unet import ControlNetXSBinding, DreamLiteBinding, UNetBinding
from diffaccel.bindings.video_unet import (
    AnimateDiffBinding,
    I2VGenXLBinding,
    ModelScopeBinding,
    StableVideoBinding,
)
from diffaccel.bindings.wan import (
    AnyFlowBinding,
    AnyFlowFARBinding,
    ChronoEditBinding,
    SkyReelsV2Binding,
    WanAnimateBinding,
    WanBinding,
    WanVACEBinding,
)
from diffaccel.bindings.z_image import ZImageBinding

__all__ = [
    "BINDINGS",
    "REFUSED",
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
    "Flux2Transformer2DModel": Flux2Binding("flux2"),
    "Flux3Transformer2DModel": Flux3Binding("flux3"),
    "ChromaTransformer2DModel": ChromaBinding("chroma"),
    "Krea2Transformer2DModel": Krea2Binding("krea2"),
    "LongCatImageTransformer2DModel": LongCatImageBinding("longcat-image"),
    "OvisImageTransformer2DModel": FluxBinding("ovis-image"),
    "BriaTransformer2DModel": BriaBinding("bria"),
    "BriaFiboTransformer2DModel": BriaFiboBinding("bria-fibo"),
    "BriaFibo2Transformer2DModel": BriaFibo2Binding(),
    "AuraFlowTransformer2DModel": AuraFlowBinding(),
    "ErnieImageTransformer2DModel": ErnieImageBinding(),
    "GlmImageTransformer2DModel": GlmImageBinding(),
    "Ideogram4Transformer2DModel": IdeogramBinding(),
    "OmniGenTransformer2DModel": OmniGenBinding(),
    "DreamLiteUNetModel": DreamLiteBinding(),
    "ZImageTransformer2DModel": ZImageBinding(),
    "Lumina2Transformer2DModel": Lumina2Binding(),
    "HunyuanImageTransformer2DModel": HunyuanImageBinding(),
    "QwenImage21Transformer2DModel": QwenImage21Binding(),
    "HiDreamImageTransformer2DModel": HiDreamBinding(),
    "CogView4Transformer2DModel": CogView4Binding(),
    "CogView3PlusTransformer2DModel": CogView3PlusBinding(),
    "PixArtTransformer2DModel": PixArtBinding(),
    "HunyuanDiT2DModel": HunyuanDiTBinding(),
    "DiTTransformer2DModel": DiTBinding(),
    "LuminaNextDiT2DModel": LuminaNextBinding(),
    "PRXTransformer2DModel": PRXBinding(),
    "NucleusMoEImageTransformer2DModel": NucleusBinding(),
    "JoyImageEditTransformer3DModel": JoyImageEditBinding(),
    "JoyImageEditPlusTransformer3DModel": JoyImageEditPlusBinding(),
    "Kandinsky3UNet": Kandinsky3Binding(),
    "UVit2DModel": UVitBinding(),
    "Transformer2DModel": Transformer2DBinding(),
    "WanVACETransformer3DModel": WanVACEBinding(),
    "WanAnimateTransformer3DModel": WanAnimateBinding(),
    "SkyReelsV2Transformer3DModel": SkyReelsV2Binding(),
    "ChronoEditTransformer3DModel": ChronoEditBinding(),
    "AnyFlowTransformer3DModel": AnyFlowBinding(),
    "AnyFlowFARTransformer3DModel": AnyFlowFARBinding(),
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15Binding(),
    "HunyuanVideoFramepackTransformer3DModel": FramepackBinding(),
    "MotifVideoTransformer3DModel": MotifVideoBinding(),
    "Kandinsky5Transformer3DModel": Kandinsky5Binding(),
    "Kandinsky6Transformer3DModel": Kandinsky6Binding(),
    "HeliosTransformer3DModel": HeliosBinding(),
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
    name = type(model).__name__
    refused = next(
        (REFUSED[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in REFUSED), ""
    )
    if refused:
        raise UnsupportedModelError(
            f"no method serves {name}: {refused}; `diffaccel info --models` lists the classes "
            "that have one"
        )
    raise UnsupportedModelError(
        f"no binding knows the attention of {name}; `diffaccel info --models` lists the classes "
        "that have one. Write a subclass of diffaccel.bindings.Binding with `patterns`, the "
        "layers that attend over visual tokens, and `layout`, what the tokens of a call are (the "
        "example in CONTRIBUTING.md is ten lines), then "
        f'diffaccel.bindings.BINDINGS["{name}"] = YourBinding()'
    )
