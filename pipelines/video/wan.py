"""How Wan 2.1 and 2.2 are driven step by step, with the parts of a stock pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a Wan model is told beside the latents.

    Args:
        text: Prompt embeddings (B, T, C).
        negative: Those of the negative prompt, or None without guidance.
        image: Image embeddings (B, I, C) of Wan 2.1 image to video, or None.
        latents: Channels that join the latents (image to video), or None.
        first_frame: Latents (B, C, 1, h, w) that the first frame keeps (Wan 2.2 5B), or None.
    """

    text: Tensor
    negative: Tensor | None = None
    image: Tensor | None = None
    latents: Tensor | None = None
    first_frame: Tensor | None = None


def check_guidance_scale(guidance_scale: float) -> None:
    """Raises ValueError unless a scale of classifier-free guidance is at least 1."""
    if not guidance_scale >= 1.0:
        raise ValueError(f"guidance_scale must be at least 1, got {guidance_scale=}")


def guided_velocity(
    predict: Callable[[str, Tensor], Tensor], conditions: Conditions, guidance_scale: float
) -> Tensor:
    """Predicts a velocity with classifier-free guidance.

    Args:
        predict: From "positive" or "negative" and the embeddings of that prompt to a velocity.
        conditions: Both prompts, or one.
        guidance_scale: 1 leaves the negative prompt out.
    """
    velocity = predict("positive", conditions.text)
    if conditions.negative is None or guidance_scale == 1.0:
        return velocity
    negative = predict("negative", conditions.negative)
    return negative + guidance_scale * (velocity - negative)


def shifted_scheduler(pipe: Any, shift: float) -> Any:
    """Copies the pipeline's flow scheduler with another shift."""
    config = dict(pipe.scheduler.config)
    config.pop("_use_default_values", None)  # diffusers would put the defaults back
    if "flow_shift" in config:
        config |= {"flow_shift": shift, "use_flow_sigmas": True}
    else:
        config |= {"shift": shift, "use_dynamic_shifting": False}
    return type(pipe.scheduler).from_config(config)


def transformer_at(pipe: Any, timestep: Tensor) -> str:
    """Names the transformer of a timestep: Wan 2.2 has one for much and one for little noise."""
    ratio = pipe.config.get("boundary_ratio")
    if ratio is None or timestep >= ratio * pipe.scheduler.config.num_train_timesteps:
        return TRANSFORMERS[0]
    return TRANSFORMERS[1]


def model_call(
    pipe: Any, name: str, x: Tensor, timestep: Tensor, conditions: Conditions
) -> dict[str, Any]:
    """Collects what a transformer is called with, apart from the text."""
    model = getattr(pipe, name)
    timesteps = timestep.expand(len(x))
    if conditions.first_frame is not None:
        x = torch.cat([conditions.first_frame.to(x.dtype), x[:, :, 1:]], 2)
    if pipe.config.get("expand_timesteps"):  # one timestep per token; a given frame has no noise
        rows, columns = (
            side // patch
            for side, patch in zip(x.shape[-2:], model.config.patch_size[1:], strict=True)
        )
        frames = torch.ones(x.shape[2], device=x.device)
        if conditions.first_frame is not None:
            frames[0] = 0.0
        timesteps = (frames * timestep).repeat_interleave(rows * columns).expand(len(x), -1)
    if conditions.latents is not None:
        x = torch.cat([x, conditions.latents.to(x.dtype)], 1)
    call = {"hidden_states": x.to(model.dtype), "timestep": timesteps}
    if conditions.image is not None:
        call["encoder_hidden_states_image"] = conditions.image.to(model.dtype)
    return call


def encode_video(pipe: Any, video: Tensor) -> Tensor:
    """Encodes (B, 3, F, H, W) in [-1, 1] to latents as the denoiser expects them, fp32."""
    posterior = pipe.vae.encode(video.to(pipe.vae.dtype)).latent_dist
    mean, std = _latent_statistics(pipe.vae, video.device)
    return (posterior.mode().float() - mean) / std


def decode_video(pipe: Any, latents: Tensor) -> Tensor:
    """Decodes latents to (B, F, 3, H, W) in [0, 1]."""
    mean, std = _latent_statistics(pipe.vae, latents.device)
    video = pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype), return_dict=False)[0]
    return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu()


def _latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def encode_conditions(
    pipe: Any,
    told: dict[str, Any],
    guidance_scale: float,
    image: Image.Image | None,
    latents: Tensor,
    frames: int,
) -> Conditions:
    """Encodes text and image for the refinement."""
    device, dtype = latents.device, pipe.transformer.dtype
    arguments = {"prompt": None, "negative_prompt": None} | told
    text, negative = pipe.encode_prompt(
        **arguments, do_classifier_free_guidance=guidance_scale > 1.0, device=device
    )
    negative = None if negative is None else negative.to(dtype)
    if image is None:
        return Conditions(text.to(dtype), negative)
    batch, height, width = (
        len(latents),
        *(side * pipe.vae_scale_factor_spatial for side in latents.shape[-2:]),
    )
    embeds = None
    if pipe.transformer.config.image_dim is not None:
        embeds = pipe.encode_image(image, device).repeat(batch, 1, 1).to(dtype)
    pixels = pipe.video_processor.preprocess(image, height=height, width=width).to(device)
    _, given, *_ = pipe.prepare_latents(
        pixels.float(), batch, latents.shape[1], height, width, frames, torch.float32, device
    )
    if pipe.config.get("expand_timesteps"):
        return Conditions(text.to(dtype), negative, embeds, first_frame=given)
    return Conditions(text.to(dtype), negative, embeds, latents=given)


@contextmanager
def tiled_vae(vae: Any) -> Iterator[None]:
    """Makes the video autoencoder work in tiles, and restores it afterwards."""
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
