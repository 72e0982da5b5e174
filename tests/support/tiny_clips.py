"""Whole tiny stock pipelines of clips with random weights; prompts come as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tiny_autoencoders as vaes
import tiny_pipelines as pipelines
import torch
import transformers
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tiny_image_pipelines.base import assembled, denoiser, prompts
from tiny_models.base import built, noise

from diffaccel.methods import SlidingWindowAttn
from diffaccel.pipelines.video.families import VIDEO_FAMILIES
from diffaccel.pipelines.video.freeswim import FreeSwim
from diffaccel.pipelines.video.job import VideoJob

Flow = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass
class TinyClip:
    """A pipeline with random weights, and how it is called.

    Args:
        pipe: The pipeline.
        told: What its call needs, but for size, length, steps and generator.
    """

    pipe: Any
    told: dict[str, Any] = field(default_factory=dict)


def _named(name: str, vae: Any) -> TinyClip:
    """One of `tiny_pipelines`, with an autoencoder."""
    tiny = pipelines.BUILDERS[name]()
    pipe = type(tiny.pipe)(**{**tiny.pipe.components, "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    told = {key: x for key, x in tiny.arguments.items() if "embeds" in key or "mask" in key}
    return TinyClip(pipe, told)


def hunyuan_video() -> TinyClip:
    return _named("hunyuan", vaes.hunyuan())


def cogvideox() -> TinyClip:
    return _named("cogvideox", vaes.cogvideox())


def ltx() -> TinyClip:
    return _named("ltx", vaes.ltx())


def hunyuan_video_15() -> TinyClip:
    """Guided by a component, which has its scale; a picture's features stand in as zeros."""
    model = denoiser("HunyuanVideo15Transformer3DModel")
    pipe = assembled(
        diffusers.HunyuanVideo15Pipeline, Flow(shift=5.0),
        transformer=built(type(model), **dict(model.config) | {"patch_size": 1}),
        vae=vaes.hunyuan_15(),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 7
    told = prompts(6, 16, mask="prompt_embeds_mask")
    second = prompts(5, 8, mask="prompt_embeds_mask")
    return TinyClip(pipe, told | {f"{name}_2": value for name, value in second.items()})


def kandinsky5() -> TinyClip:
    """Channels of a given first frame are there and empty, as in the published models."""
    pipe = assembled(
        diffusers.Kandinsky5T2VPipeline, Flow(shift=5.0),
        transformer=denoiser("Kandinsky5Transformer3DModel"), vae=vaes.hunyuan(),
    )  # fmt: skip
    told = {}
    for sign, seed in (("", 2), ("negative_", 3)):
        told |= {
            f"{sign}prompt_embeds_qwen": noise(1, 6, 16, seed=seed),
            f"{sign}prompt_embeds_clip": noise(1, 8, seed=seed),
            f"{sign}prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        }
    return TinyClip(pipe, told)


def anyflow() -> TinyClip:
    pipe = assembled(
        diffusers.AnyFlowPipeline, diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=denoiser("AnyFlowTransformer3DModel"), vae=vaes.wan(),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 32))


def motif() -> TinyClip:
    """Guided by a component, which has its scale."""
    pipe = assembled(
        diffusers.MotifVideoPipeline, Flow(shift=5.0),
        transformer=denoiser("MotifVideoTransformer3DModel"), vae=vaes.wan(4),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 16, mask="prompt_attention_mask"))


def easyanimate() -> TinyClip:
    pipe = assembled(
        diffusers.EasyAnimatePipeline, Flow(shift=5.0),
        transformer=denoiser("EasyAnimateTransformer3DModel"), vae=vaes.magvit(),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 16, mask="prompt_attention_mask"))


def animatediff() -> TinyClip:
    model = denoiser("UNetMotionModel")
    pipe = assembled(
        diffusers.AnimateDiffPipeline, diffusers.DDIMScheduler(clip_sample=False),
        unet=built(type(model), **dict(model.config) | {"motion_max_seq_length": 8}),
        vae=pipelines.vae(4, levels=4),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 16))


def skyreels_v2() -> TinyClip:
    pipe = assembled(
        diffusers.SkyReelsV2Pipeline, pipelines.wan21().pipe.scheduler,
        transformer=denoiser("SkyReelsV2Transformer3DModel"), vae=vaes.wan(),
    )  # fmt: skip
    return TinyClip(pipe, prompts(6, 32))


def mochi() -> TinyClip:
    transformer = built(
        diffusers.MochiTransformer3DModel, patch_size=2, num_attention_heads=2,
        attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=16, time_embed_dim=8,
    )  # fmt: skip
    pipe = assembled(diffusers.MochiPipeline, Flow(), transformer=transformer, vae=vaes.mochi())
    return TinyClip(pipe, prompts(6, 16, mask="prompt_attention_mask", dtype=torch.bool))


class Harmless:
    """Stands for the checker of Cosmos, a package of its own: finds nothing."""

    def to(self, *_: Any) -> Harmless:
        return self

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def _cosmos(kind: Any, scheduler: Any, vae: Any, **config: Any) -> TinyClip:
    transformer = built(
        diffusers.CosmosTransformer3DModel, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32),
        patch_size=(1, 2, 2), concat_padding_mask=False, **config,
    )  # fmt: skip
    pipe = assembled(kind, scheduler, transformer=transformer, vae=vae, safety_checker=Harmless())
    return TinyClip(pipe, prompts(6, 16))


def cosmos() -> TinyClip:
    return _cosmos(
        diffusers.CosmosTextToWorldPipeline, diffusers.EDMEulerScheduler(sigma_data=0.5),
        vaes.cosmos(), in_channels=4, out_channels=4,
    )  # fmt: skip


def cosmos_25() -> TinyClip:
    """A mask of the condition frames in a further channel."""
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    return _cosmos(
        diffusers.Cosmos2_5_PredictBasePipeline, scheduler, vaes.wan(), in_channels=17,
        out_channels=16, extra_pos_embed_type=None,
    )  # fmt: skip


def ltx2() -> TinyClip:
    """Sound beside the video: 25 latents of 2 channels and 2 bins a second."""
    transformer = built(
        diffusers.LTX2VideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=2,
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    connectors = built(
        LTX2TextConnectors, caption_channels=16, text_proj_in_factor=2,
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
        rope_double_precision=False,
    )  # fmt: skip
    vocoder = built(
        LTX2Vocoder, in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1]],
    )  # fmt: skip
    pipe = assembled(
        diffusers.LTX2Pipeline, Flow(), transformer=transformer, connectors=connectors,
        vocoder=vocoder, vae=vaes.ltx2(), audio_vae=vaes.ltx2_sound(),
    )  # fmt: skip
    return TinyClip(
        pipe,
        prompts(6, 32, mask="prompt_attention_mask") | {"spatio_temporal_guidance_blocks": [1]},
    )


def _given(tiny: TinyClip, kind: Any, **changes: Any) -> TinyClip:
    """The pipeline of the same parts that starts from a picture."""
    parts = {**tiny.pipe.components, **changes}
    if "safety_checker" in parts:
        parts["safety_checker"] = Harmless()
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return TinyClip(pipe, tiny.told)


def cogvideox_given() -> TinyClip:
    """The picture's latents in further channels."""
    tiny = cogvideox()
    model = tiny.pipe.transformer
    wider = built(type(model), **dict(model.config) | {"in_channels": 8})
    return _given(tiny, diffusers.CogVideoXImageToVideoPipeline, transformer=wider)


def cosmos_given() -> TinyClip:
    """A mask of the given frames in a further channel."""
    tiny = cosmos()
    model = tiny.pipe.transformer
    wider = built(type(model), **dict(model.config) | {"in_channels": 5})
    return _given(tiny, diffusers.CosmosVideoToWorldPipeline, transformer=wider)


def ltx_given() -> TinyClip:
    """The picture in the first latent frame; stock scales it by 1, as published."""
    tiny = _given(ltx(), diffusers.LTXImageToVideoPipeline)
    tiny.pipe.vae.register_to_config(scaling_factor=1.0)
    return tiny


def ltx2_given() -> TinyClip:
    """Without the compression of the picture, which takes a package of its own."""
    tiny = _given(ltx2(), diffusers.LTX2ImageToVideoPipeline)
    tiny.pipe.vae.register_to_config(scaling_factor=1.0)
    return TinyClip(tiny.pipe, tiny.told | {"image_crf": 0})


def skyreels_v2_given() -> TinyClip:
    """The picture's latents in further channels, and its features."""
    model = denoiser("SkyReelsV2Transformer3DModel:image")
    features = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=224, patch_size=14,
    )  # fmt: skip
    tiny = _given(
        skyreels_v2(), diffusers.SkyReelsV2ImageToVideoPipeline, transformer=model,
        image_encoder=built(transformers.CLIPVisionModel, config=features),
        image_processor=transformers.CLIPImageProcessor(),
    )  # fmt: skip
    told = {name: x.repeat(1, 86, 1)[:, :512] for name, x in tiny.told.items()}
    return TinyClip(tiny.pipe, told)


GIVEN: dict[str, Callable[[], TinyClip]] = {
    "CogVideoXImageToVideoPipeline": cogvideox_given,
    "CosmosVideoToWorldPipeline": cosmos_given,
    "Kandinsky5I2VPipeline": lambda: _given(kandinsky5(), diffusers.Kandinsky5I2VPipeline),
    "LTX2ImageToVideoPipeline": ltx2_given,
    "LTXImageToVideoPipeline": ltx_given,
    "SkyReelsV2ImageToVideoPipeline": skyreels_v2_given,
}
"""Those that start from a picture."""
CLIPS: dict[str, Callable[[], TinyClip]] = {
    "AnimateDiffPipeline": animatediff,
    "AnyFlowPipeline": anyflow,
    "CogVideoXPipeline": cogvideox,
    "Cosmos2_5_PredictBasePipeline": cosmos_25,
    "CosmosTextToWorldPipeline": cosmos,
    "EasyAnimatePipeline": easyanimate,
    "HunyuanVideo15Pipeline": hunyuan_video_15,
    "HunyuanVideoPipeline": hunyuan_video,
    "Kandinsky5T2VPipeline": kandinsky5,
    "LTX2Pipeline": ltx2,
    "LTXPipeline": ltx,
    "MochiPipeline": mochi,
    "MotifVideoPipeline": motif,
    "SkyReelsV2Pipeline": skyreels_v2,
}


FAST = FreeSwim(
    steps=4, strength=0.5, guidance_scale=2.0, method=SlidingWindowAttn((1, 3, 3)), guide_every=2
)


def job_of(pipe: Any, told: dict[str, Any], size: tuple[int, int], **changes: Any) -> VideoJob:
    """A job of 2 steps whose native size is 4 x 3 tokens.

    Args:
        pipe: The pipeline.
        told: Its prompts and whatever else.
        size: Columns and rows of tokens.
        changes: Of the job.
    """
    multiple = VIDEO_FAMILIES[type(pipe).__name__].multiple
    embeds = {name: told[name] for name in told if name in VideoJob.__dataclass_fields__}
    others = {name: value for name, value in told.items() if name not in embeds}
    frames = 2 * VIDEO_FAMILIES[type(pipe).__name__].frame_step + 1
    frames = changes.pop("frames", frames)
    others |= changes.pop("arguments", {})
    return VideoJob(
        None, tuple(side * multiple for side in size), frames, **embeds, arguments=others,
        steps=2, native=(4 * multiple, 3 * multiple), **{"recipe": FAST, **changes},
    )  # fmt: skip
