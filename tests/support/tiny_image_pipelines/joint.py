"""Flow pipelines that hold their latents as pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_models.base import built, noise
from tiny_models.kandinsky import SMALL

from tiny_image_pipelines import autoencoders
from tiny_image_pipelines.base import (
    Builder,
    Flow,
    TinyImagePipeline,
    assembled,
    denoiser,
    prompts,
)  # fmt: skip


def auraflow() -> TinyImagePipeline:
    """AuraFlow: CFG in one batch."""
    pipe = assembled(
        diffusers.AuraFlowPipeline, Flow(shift=1.73), vae=autoencoders.kl(),
        transformer=denoiser("AuraFlowTransformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 32, mask="prompt_attention_mask"))


def cogview4() -> TinyImagePipeline:
    """CogView4: CFG in two calls, a shift that is linear in the side."""
    scheduler = Flow(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipe = assembled(
        diffusers.CogView4Pipeline, scheduler, vae=autoencoders.kl(),
        transformer=denoiser("CogView4Transformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(16, 16))


def glm() -> TinyImagePipeline:
    """GLM-Image: CFG in two calls, the tokens of a prior that its language model would write."""
    scheduler = Flow(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipe: Any = assembled(
        diffusers.GlmImagePipeline, scheduler, vae=autoencoders.kl(),
        transformer=denoiser("GlmImageTransformer2DModel"),
    )  # fmt: skip

    def prior(height: int, width: int, generator: torch.Generator, **_: Any) -> Any:
        torch.manual_seed(generator.initial_seed())
        coarse = torch.randint(32, (1, 1, height // 32, width // 32)).float()
        fine = torch.nn.functional.interpolate(coarse, scale_factor=2).long()
        return fine.flatten(1), None, None

    pipe.generate_prior_tokens = prior
    embeds = prompts(6, 16)
    pipe.encode_prompt = lambda *_, **__: tuple(embeds.values())
    return TinyImagePipeline(pipe, prompt="a cat")


def hidream() -> TinyImagePipeline:
    """HiDream: CFG in one batch; pictures beyond its native area are square."""
    model = built(
        diffusers.HiDreamImageTransformer2DModel, patch_size=2, in_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        caption_channels=[16, 12], text_emb_dim=8, num_routed_experts=2, num_activated_experts=2,
        axes_dims_rope=(4, 4, 4), max_resolution=(8, 8), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = assembled(
        diffusers.HiDreamImagePipeline, scheduler, vae=autoencoders.kl(), transformer=model
    )
    told = {
        f"{sign}{name}": noise(*shape, seed=seed + len(sign))
        for sign in ("", "negative_")
        for seed, (name, shape) in enumerate(
            {
                "prompt_embeds_t5": (1, 4, 16),
                "prompt_embeds_llama3": (2, 1, 6, 12),
                "pooled_prompt_embeds": (1, 8),
            }.items()
        )
    }
    return TinyImagePipeline(pipe, told, size=(128, 128))


def hunyuan_image() -> TinyImagePipeline:
    """HunyuanImage 2.1: CFG in two calls by its guider, text and glyphs."""
    guider = diffusers.AdaptiveProjectedMixGuidance(
        guidance_scale=3.5, adaptive_projected_guidance_scale=10.0
    )
    pipe = assembled(
        diffusers.HunyuanImagePipeline, Flow(shift=5.0), vae=autoencoders.hunyuan(),
        transformer=denoiser("HunyuanImageTransformer2DModel:glyphs"), guider=guider,
        ocr_guider=guider,
    )  # fmt: skip
    told = prompts(6, 16, mask="prompt_embeds_mask")
    told |= {f"{name}_2": value[:, :5] for name, value in told.items()}
    told |= {name: told[name][..., :8] for name in told if name.endswith("embeds_2")}
    return TinyImagePipeline(pipe, told)


def kandinsky5() -> TinyImagePipeline:
    """Kandinsky 5: CFG in two calls, latents (B, 1, h, w, C), cross-attended text."""
    pipe = assembled(
        diffusers.Kandinsky5T2IPipeline, Flow(shift=3.0), vae=autoencoders.kl(),
        transformer=built(diffusers.Kandinsky5Transformer3DModel, **SMALL),
    )  # fmt: skip
    told: dict[str, Any] = {}
    for seed, sign in enumerate(("", "negative_")):
        told[f"{sign}prompt_embeds_qwen"] = noise(1, 6, 16, seed=2 + seed)
        told[f"{sign}prompt_embeds_clip"] = noise(1, 8, seed=4 + seed)
        told[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 6])
    return TinyImagePipeline(pipe, told)


def lumina2() -> TinyImagePipeline:
    """Lumina 2: CFG in two calls."""
    pipe = assembled(
        diffusers.Lumina2Pipeline, Flow(shift=6.0), vae=autoencoders.kl(),
        transformer=denoiser("Lumina2Transformer2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 16, mask="prompt_attention_mask"))


def lumina() -> TinyImagePipeline:
    """Lumina-Next: CFG in one batch, cross-attended text."""
    pipe = assembled(
        diffusers.LuminaPipeline, Flow(shift=1.0), vae=autoencoders.kl(),
        transformer=denoiser("LuminaNextDiT2DModel"),
    )  # fmt: skip
    return TinyImagePipeline(pipe, prompts(6, 12, mask="prompt_attention_mask"))


def prx(is_deep: bool = False) -> TinyImagePipeline:
    """PRX: CFG in one batch; the deep compression autoencoder has patches of one element."""
    model = denoiser("PRXTransformer2DModel")
    if is_deep:
        model = built(
            diffusers.PRXTransformer2DModel, in_channels=4, context_in_dim=16, hidden_size=24,
            mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[6, 6], patch_size=1,
        )  # fmt: skip
    pipe = assembled(
        diffusers.PRXPipeline, Flow(shift=3.0), transformer=model,
        vae=autoencoders.deep() if is_deep else autoencoders.kl(),
    )  # fmt: skip
    told = prompts(6, 16, mask="prompt_attention_mask", dtype=torch.bool)
    told |= {"negative_prompt": None}
    return TinyImagePipeline(pipe, told)


def z_image() -> TinyImagePipeline:
    """Z-Image: lists of texts; CFG in one batch."""
    pipe = assembled(
        diffusers.ZImagePipeline, Flow(shift=6.0), vae=autoencoders.kl(),
        transformer=denoiser("ZImageTransformer2DModel"),
    )  # fmt: skip
    told = {name: list(embeds) for name, embeds in prompts(6, 16).items()}
    return TinyImagePipeline(pipe, told)


BUILDERS: dict[str, Builder] = {
    "AuraFlowPipeline": auraflow,
    "CogView4Pipeline": cogview4,
    "GlmImagePipeline": glm,
    "HiDreamImagePipeline": hidream,
    "HunyuanImagePipeline": hunyuan_image,
    "Kandinsky5T2IPipeline": kandinsky5,
    "Lumina2Pipeline": lumina2,
    "LuminaPipeline": lumina,
    "PRXPipeline": prx,
    "PRXPipeline:deep": lambda: prx(is_deep=True),
    "ZImagePipeline": z_image,
}
