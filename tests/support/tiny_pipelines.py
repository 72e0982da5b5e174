"""Stock diffusers pipelines with tiny random models that run offline in about a second on a CPU.

Sizes are non-square, so that a swap of height and width shows. Text encoders are None: prompts
come as random embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from diffaccel.layout import TokenLayout

STEPS = 2
NUMBERS = ("", "_2", "_3")
Flow = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass
class TinyPipeline:
    """A pipeline, the arguments of one call, and what an attached method should see.

    Args:
        pipe: The pipeline.
        arguments: Keyword arguments of a call, except for the generator.
        family: The family that the binding should resolve.
        layouts: Every token layout that an attached layer should get.
        layers: Number of attached layers for each denoiser.
        skipped: Number of other attention layers in the first denoiser.
        calls: Model calls in one run, over all denoisers.
    """

    pipe: Any
    arguments: dict[str, Any]
    family: str
    layouts: set[TokenLayout]
    layers: dict[str, int]
    skipped: int
    calls: int

    def sample(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        """Runs the pipeline and returns its latents."""
        arguments = {**self.arguments, **changes}
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            return self.pipe(
                **arguments, generator=generator, output_type="latent", return_dict=False
            )[0]

    def denoisers(self) -> dict[str, torch.nn.Module]:
        """Returns the denoisers by component name."""
        return {name: getattr(self.pipe, name) for name in self.layers}


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(model_class: type, **config: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(**config).eval()


def _pipe(pipeline_class: type, scheduler: Any, **components: Any) -> Any:
    parts = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in NUMBERS]
    accepted = inspect.signature(pipeline_class.__init__).parameters
    missing = {name: None for name in (*parts, "vae") if name in accepted}
    pipe = pipeline_class(**{**missing, **components}, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _call(
    prompt: tuple[int, int], height: int, width: int, *, pooled: int = 0, negative: int = 0,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call.

    Args:
        prompt: Tokens of the prompt, and their width.
        height: Of the picture in pixels.
        width: Of the picture in pixels.
        pooled: Width of the pooled embeddings, 0 where there are none.
        negative: Tokens of the negative prompt, 0 where there is none.
        others: Further arguments.
    """
    arguments = {"prompt_embeds": _random(1, *prompt)}
    if negative:
        arguments["negative_prompt_embeds"] = _random(1, negative, prompt[1], seed=2)
    if pooled:
        arguments["pooled_prompt_embeds"] = _random(1, pooled)
    if pooled and negative:
        arguments["negative_pooled_prompt_embeds"] = _random(1, pooled, seed=2)
    return arguments | {"height": height, "width": width, "num_inference_steps": STEPS} | others


def _padded(tokens: int, padding: int) -> torch.Tensor:
    """A mask over so many tokens, then so much padding."""
    return torch.tensor([[1] * tokens + [0] * padding])


def vae(latent_channels: int, levels: int = 3) -> diffusers.AutoencoderKL:
    """A tiny image VAE that halves the resolution between levels; it has attention of its own."""
    return _model(
        diffusers.AutoencoderKL, latent_channels=latent_channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=(4,) * levels,
        norm_num_groups=2,
    )  # fmt: skip


def flux(head_dim: int = 16, height: int = 64, width: int = 96) -> TinyPipeline:
    """FLUX.1: 2 double and 2 single blocks; 12 text tokens, then the image."""
    rotary = (head_dim // 4, head_dim // 4 + head_dim // 8, head_dim // 4 + head_dim // 8)
    transformer = _model(
        diffusers.FluxTransformer2DModel, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=head_dim, num_attention_heads=2, axes_dims_rope=rotary,
        joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    pipe = _pipe(diffusers.FluxPipeline, Flow(), transformer=transformer, vae=vae(4))
    arguments = _call((12, 32), height, width, pooled=32)
    layout = TokenLayout.image(height // 8, width // 8, text_before=12)
    return TinyPipeline(pipe, arguments, "flux", {layout}, {"transformer": 4}, 0, STEPS)


def sd3() -> TinyPipeline:
    """SD 3.5: 2 blocks, the first with a second, image-only attention; CFG in one batch."""
    transformer = _model(
        diffusers.SD3Transformer2DModel, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, sample_size=32, pos_embed_max_size=32,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        patch_size=2, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pipe = _pipe(diffusers.StableDiffusion3Pipeline, Flow(), transformer=transformer, vae=vae(4))
    arguments = _call((10, 32), 64, 96, pooled=64, negative=10)
    layouts = {TokenLayout.image(8, 12, text_after=10), TokenLayout.image(8, 12)}
    return TinyPipeline(pipe, arguments, "sd3", layouts, {"transformer": 3}, 0, STEPS)


def qwen() -> TinyPipeline:
    """Qwen-Image: 2 blocks, text padding, CFG as two calls with texts of different lengths."""
    transformer = _model(
        diffusers.QwenImageTransformer2DModel, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6),
        joint_attention_dim=16,
    )  # fmt: skip
    arguments = _call(
        (12, 16), 128, 192, negative=7, true_cfg_scale=2.0,
        prompt_embeds_mask=_padded(9, 3), negative_prompt_embeds_mask=_padded(7, 0),
    )  # fmt: skip
    pipe = _pipe(diffusers.QwenImagePipeline, Flow(), transformer=transformer)
    layouts = {TokenLayout.image(8, 12, text_before=text) for text in (12, 7)}
    return TinyPipeline(pipe, arguments, "qwen", layouts, {"transformer": 2}, 0, 2 * STEPS)


VIDEO = (3, 4, 6)  # latent frames, rows and columns of tokens of all videos


def wan_transformer(**changes: Any) -> torch.nn.Module:
    """A tiny transformer of Wan, some of its configuration changed."""
    config = {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32,
        "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "text_dim": 32,
        "freq_dim": 32, "rope_max_seq_len": 32,
    }  # fmt: skip
    return _model(diffusers.WanTransformer3DModel, **{**config, **changes})


def _wan(family: str, options: dict[str, Any], **models: torch.nn.Module) -> TinyPipeline:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = _pipe(diffusers.WanPipeline, scheduler, **models, **options)
    arguments = _call((16, 32), 64, 96, negative=16, num_frames=9)
    layers = dict.fromkeys(models, 2)
    return TinyPipeline(pipe, arguments, family, {TokenLayout.video(*VIDEO)}, layers, 2, 2 * STEPS)


def wan21() -> TinyPipeline:
    """Wan 2.1: 2 blocks, 3 latent frames, CFG as two calls."""
    return _wan("wan2.1-t2v", {}, transformer=wan_transformer())


def wan22() -> TinyPipeline:
    """Wan 2.2: two transformers, each of which gets one of the two steps."""
    options = {"boundary_ratio": 0.875}
    second = wan_transformer(ffn_dim=48)
    return _wan("wan2.2-t2v", options, transformer=wan_transformer(), transformer_2=second)


def wan22_ti2v() -> TinyPipeline:
    """Wan 2.2 5B: one transformer, a timestep for each token."""
    transformer = wan_transformer(in_channels=48, out_channels=48)
    return _wan("wan2.2-ti2v", {"expand_timesteps": True}, transformer=transformer)


def hunyuan() -> TinyPipeline:
    """HunyuanVideo: 2 double and 1 single block, a token refiner, padded text after the video."""
    transformer = _model(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_layers=2,
        num_single_layers=1, num_refiner_layers=1, attention_head_dim=10, num_attention_heads=2,
        patch_size=2, patch_size_t=1, rope_axes_dim=(2, 4, 4), guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8,
    )  # fmt: skip
    pipe = _pipe(diffusers.HunyuanVideoPipeline, Flow(shift=7.0), transformer=transformer)
    arguments = _call(
        (11, 16), 64, 96, pooled=8, num_frames=9, prompt_attention_mask=_padded(7, 4)
    )
    layouts = {TokenLayout.video(*VIDEO, text_after=11)}
    return TinyPipeline(pipe, arguments, "hunyuan", layouts, {"transformer": 3}, 1, STEPS)


def cogvideox() -> TinyPipeline:
    """CogVideoX: 2 blocks, text before the video, latents (B, F, C, H, W), CFG in one batch."""
    transformer = _model(
        diffusers.CogVideoXTransformer3DModel, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, time_embed_dim=2, text_embed_dim=32,
        sample_width=12, sample_height=8, sample_frames=9, max_text_seq_length=16,
        patch_size=2, temporal_compression_ratio=4, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = _pipe(diffusers.CogVideoXPipeline, scheduler, transformer=transformer)
    arguments = _call((16, 32), 64, 96, negative=16, num_frames=9)
    layouts = {TokenLayout.video(*VIDEO, text_before=16)}
    return TinyPipeline(pipe, arguments, "cogvideox", layouts, {"transformer": 2}, 0, STEPS)


def ltx() -> TinyPipeline:
    """LTX-Video: 2 blocks, packed video, cross-attended text with padding, CFG in one batch."""
    transformer = _model(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=32,
    )  # fmt: skip
    pipe = _pipe(diffusers.LTXPipeline, Flow(), transformer=transformer)
    masks = dict.fromkeys(
        ("prompt_attention_mask", "negative_prompt_attention_mask"), _padded(9, 3)
    )
    arguments = _call((12, 32), 128, 192, negative=12, num_frames=17, **masks)
    layouts = {TokenLayout.video(*VIDEO)}
    return TinyPipeline(pipe, arguments, "ltx", layouts, {"transformer": 2}, 2, STEPS)


def _unet(**changes: Any) -> torch.nn.Module:
    config = {
        "in_channels": 4, "out_channels": 4, "sample_size": 16, "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2, "layers_per_block": 1,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2, "attention_head_dim": 2,
        "cross_attention_dim": 16, "norm_num_groups": 2,
    }  # fmt: skip
    return _model(diffusers.UNet2DConditionModel, **{**config, **changes})


def sd15() -> TinyPipeline:
    """SD 1.5: two levels of attention, an odd latent height, CFG in one batch."""
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = _pipe(
        diffusers.StableDiffusionPipeline, scheduler, unet=_unet(), vae=vae(4),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    arguments = _call((7, 16), 72, 120, negative=7)
    layouts = {TokenLayout.image(18, 30), TokenLayout.image(9, 15)}
    return TinyPipeline(pipe, arguments, "sd15", layouts, {"unet": 7}, 7, STEPS)


def sdxl() -> TinyPipeline:
    """SDXL: attention below the top level only, two transformer blocks at the deepest."""
    unet = _unet(
        block_out_channels=(8, 8, 16), transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.StableDiffusionXLPipeline, diffusers.EulerDiscreteScheduler(), unet=unet,
        vae=vae(4), add_watermarker=False,
    )  # fmt: skip
    arguments = _call((7, 16), 72, 104, pooled=16, negative=7)
    # The latent is 18 x 26; level 1 has 9 x 13, level 2 rounds up to 5 x 7.
    layouts = {TokenLayout.image(9, 13), TokenLayout.image(5, 7)}
    return TinyPipeline(pipe, arguments, "sdxl", layouts, {"unet": 11}, 11, STEPS)


BUILDERS: dict[str, Callable[[], TinyPipeline]] = {
    "flux": flux,
    "sd3": sd3,
    "qwen": qwen,
    "wan2.1": wan21,
    "wan2.2": wan22,
    "wan2.2-ti2v": wan22_ti2v,
    "hunyuan": hunyuan,
    "cogvideox": cogvideox,
    "ltx": ltx,
    "sd15": sd15,
    "sdxl": sdxl,
}
