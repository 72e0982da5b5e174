"""Tiny pipelines that a ControlNet or a T2I-Adapter steers, whose weights act."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import tiny_autoencoders
import tiny_pipelines
import torch
from tiny_image_pipelines import autoencoders
from tiny_models.base import built
from tiny_pipelines import TinyPipeline


def of_class(tiny: TinyPipeline, pipeline_class: Any, **components: Any) -> TinyPipeline:
    """Gives a tiny pipeline another class, with the same components and some more."""
    accepted = inspect.signature(pipeline_class.__init__).parameters
    parts = {name: part for name, part in tiny.pipe.components.items() if name in accepted}
    for name in ("requires_safety_checker", "add_watermarker"):
        if name in accepted:
            components[name] = False
    tiny.pipe = pipeline_class(**parts, **components)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def _acting(model: torch.nn.Module) -> torch.nn.Module:
    """Gives weights that begin as zeros others."""
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        if not weight.any():
            weight.data.normal_(std=0.1, generator=generator)
    return model.eval()


def _picture(tiny: TinyPipeline, seed: int = 7) -> torch.Tensor:
    size = tiny.arguments["height"], tiny.arguments["width"]
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def _controlled(
    family: str, pipeline_class: Any, control: Callable[[Any], Any], **told: Any
) -> TinyPipeline:
    """A tiny pipeline with a ControlNet, or several.

    Args:
        family: Which one.
        pipeline_class: What it becomes.
        control: Makes the ControlNet from the denoiser.
        told: Further arguments of a call; the picture comes as `control_image` unless told.
    """
    tiny = tiny_pipelines.BUILDERS[family]()
    (model,) = tiny.denoisers().values()
    tiny.pipe.vae = tiny_autoencoders.qwen() if family == "qwen" else autoencoders.kl()
    tiny.arguments |= {"height": 112, "width": 144}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = control(model)
    nets = [_acting(net) for net in made] if isinstance(made, list) else _acting(made)
    of_class(tiny, pipeline_class, controlnet=nets)
    tiny.arguments |= {name: get(tiny) for name, get in told.items()}
    return tiny


def _union_net(unet: Any) -> Any:
    widths = {"num_trans_channel": 8, "num_proj_channel": 8, "num_trans_head": 2}
    widths["conditioning_embedding_out_channels"] = (4, 4, 4, 4)
    return diffusers.ControlNetUnionModel.from_config({**unet.config, **widths})


def _flux_net(transformer: Any) -> Any:
    options = {"attention_head_dim": 16, "num_attention_heads": 2}
    return diffusers.FluxControlNetModel.from_transformer(transformer, 1, 1, **options)


def _sd3_net(transformer: Any) -> Any:
    config = dict(transformer.config) | {"num_layers": 1, "extra_conditioning_channels": 0}
    return diffusers.SD3ControlNetModel.from_config(config)


def _qwen_net(transformer: Any) -> Any:
    return diffusers.QwenImageControlNetModel.from_transformer(transformer, 1, 16, 2)


def _twice(make: Callable[[Any], Any], model: Any) -> list[Any]:
    return [make(model), make(model)]


def _pictures(tiny: TinyPipeline) -> list[torch.Tensor]:
    return [_picture(tiny), _picture(tiny, 8)]


def _adapted(family: str, pipeline_class: Any, channels: list[int], **options: Any) -> Any:
    """A tiny pipeline with a T2I-Adapter, in sizes that it takes."""
    tiny = tiny_pipelines.BUILDERS[family]()
    tiny.pipe.vae = autoencoders.kl()
    tiny.arguments |= {"height": 128, "width": 192}
    adapter = built(
        diffusers.T2IAdapter, in_channels=3, channels=channels, num_res_blocks=1, **options
    )
    of_class(tiny, pipeline_class, adapter=_acting(adapter))
    tiny.arguments["image"] = _picture(tiny)
    return tiny


_UNET_NET = partial(
    diffusers.ControlNetModel.from_unet, conditioning_embedding_out_channels=(4, 4, 4, 4)
)
_SD15 = diffusers.StableDiffusionControlNetPipeline
_SDXL = diffusers.StableDiffusionXLControlNetPipeline
_UNION = diffusers.StableDiffusionXLControlNetUnionPipeline
_FLUX = diffusers.FluxControlNetPipeline

BUILDERS: dict[str, Callable[[], TinyPipeline]] = {
    "sd15": partial(_controlled, "sd15", _SD15, _UNET_NET, image=_picture),
    "sd15 guessing": partial(
        _controlled, "sd15", _SD15, _UNET_NET, image=_picture, guess_mode=lambda tiny: True
    ),
    "sd15 early": partial(
        _controlled, "sd15", _SD15, _UNET_NET, image=_picture,
        control_guidance_end=lambda tiny: 0.5,
    ),
    "sd15 twice": partial(
        _controlled, "sd15", _SD15, partial(_twice, _UNET_NET), image=_pictures
    ),
    "sd15 from a picture": partial(
        _controlled, "sd15", diffusers.StableDiffusionControlNetImg2ImgPipeline, _UNET_NET,
        image=_picture, control_image=partial(_picture, seed=8), strength=lambda tiny: 0.9,
        num_inference_steps=lambda tiny: 3,
    ),
    "sdxl": partial(_controlled, "sdxl", _SDXL, _UNET_NET, image=_picture),
    "sdxl union": partial(
        _controlled, "sdxl", _UNION, _union_net,
        control_image=lambda tiny: [_picture(tiny)], control_mode=lambda tiny: [1],
    ),
    "flux": partial(_controlled, "flux", _FLUX, _flux_net, control_image=_picture),
    "flux twice": partial(
        _controlled, "flux", _FLUX, partial(_twice, _flux_net), control_image=_pictures,
        controlnet_conditioning_scale=lambda tiny: [0.5, 0.8],
    ),
    "sd3": partial(
        _controlled, "sd3", diffusers.StableDiffusion3ControlNetPipeline, _sd3_net,
        control_image=_picture,
    ),
    "qwen": partial(
        _controlled, "qwen", diffusers.QwenImageControlNetPipeline, _qwen_net,
        control_image=_picture,
    ),
    "sd15 adapter": partial(
        _adapted, "sd15", diffusers.StableDiffusionAdapterPipeline, [8, 16]
    ),
    "sdxl adapter": partial(
        _adapted, "sdxl", diffusers.StableDiffusionXLAdapterPipeline, [8, 8, 16],
        adapter_type="full_adapter_xl", downscale_factor=16,
    ),
}  # fmt: skip
