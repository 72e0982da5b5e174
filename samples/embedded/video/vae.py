"""Trains the video autoencoder (8 x 8 px, 4 frames, 16 latent channels) on crops of clips."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from embedded.image.vae import HELD_OUT_SEED, edge_loss
from embedded.training.muon import Muon
from embedded.training.replicas import rank, replicate
from embedded.training.run import TrainingRun
from embedded.video.clips import (
    Actor,
    Clip,
    every_clip,
    every_close_up,
    held_out_clips,
    render_clip,
)
from embedded.video.model import CHANNELS


@dataclass(frozen=True, slots=True)
class VideoVaeTraining:
    """How the autoencoder is trained.

    Attributes:
        minutes: Wall-clock length.
        name: Of its checkpoint and of the folder of the result.
        learning_rate: Peak rate of Muon (inner convolutions); AdamW (the rest) gets twice that.
        pictures: Share of the run that trains on single frames, which teach shapes and colours
            five times as fast as clips do.
        crops: Number, frames and side in pixels of the crops of a step, taken in turn.
        close_ups: Share of close-ups among the clips, which move two to four times as fast.
        pool: Clips held in memory; one is redrawn every fourth step.
        kl: Weight of the mean Kullback-Leibler term, small: it only keeps latents smooth.
        noise: Deviation of noise on the latents in terms of theirs, so that the decoder bears
            the errors of the diffusion model.
        edges: Weight of the L1 distance of picture gradients.
        seed: Seed of the clips and of the weights.
    """

    minutes: float
    name: str = "vae"
    learning_rate: float = 1e-3
    pictures: float = 0.25
    crops: tuple[tuple[int, int, int], ...] = ((2, 9, 64), (3, 5, 64), (1, 17, 64), (1, 5, 128))
    close_ups: float = 0.0
    pool: int = 216
    kl: float = 1e-3
    noise: float = 0.08
    edges: float = 0.5
    seed: int = 0


def new_video_vae() -> AutoencoderKLWan:
    """Builds the untrained autoencoder, about 80k multiply-adds per pixel and frame.

    It works on patches of 2 x 2 px, as that of Wan 2.2 does: convolutions at full size cost most
    and would do least for flat drawings. The residual branches start at zero and the remaining
    path keeps the size of its signal, so that training starts from an almost linear codec.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                _initialise(name, module)
        vae.encoder.conv_out.weight[CHANNELS:].mul_(0.1)
        vae.encoder.conv_out.bias[CHANNELS:].fill_(-5.0)
    return vae


def _initialise(name: str, convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Sets a convolution to zero, to an orthogonal map of pixels, or to unit-gain noise.

    Nothing starts by looking back in time, so that what is learned from single frames holds for
    every frame of a clip.
    """
    weight = convolution.weight
    convolution.bias.zero_()
    outputs, inputs, *sides = weight.shape
    is_upsampling = "decoder" in name and "resample" in name
    if name.endswith(("conv2", "proj")):
        weight.zero_()
    elif is_upsampling or name.endswith(("conv_in", "conv_shortcut", "quant_conv", "time_conv")):
        # Causal convolutions see the present frame with their last tap.
        taps = [side // 2 for side in sides]
        if len(sides) == 3:
            taps[0] = sides[0] - 1
        centre = torch.empty(outputs, inputs)
        nn.init.orthogonal_(centre, gain=max(1.0, (outputs / inputs) ** 0.5))
        if name.endswith("time_conv"):  # both of the frames that it makes start equal
            centre = torch.eye(inputs).repeat(outputs // inputs, 1)
        if name.endswith("quant_conv"):
            centre = torch.eye(outputs)
        weight.mul_(0.0 if name.endswith(("quant_conv", "time_conv")) else 0.3)
        weight[(slice(None), slice(None), *taps)] += centre
    elif not name.endswith(("conv1", "to_qkv")):
        nn.init.normal_(weight, 0.0, weight[0].numel() ** -0.5)
    if len(sides) == 3:
        weight[:, :, :-1] = 0.0


def to_video(clips: np.ndarray) -> Tensor:
    """Turns (B, F, H, W, 3) bytes into (B, 3, F, H, W) floats in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def train_video_vae(
    cast: tuple[Actor, ...], settings: VideoVaeTraining, work: Path, start: Path | None = None
) -> AutoencoderKLWan:
    """Trains the autoencoder, resuming from its checkpoint, and saves it to a folder in `work`.

    Args:
        cast: What the clips show.
        settings: How to train.
        work: Folder of checkpoints.
        start: Folder of an autoencoder to start from; none to start untrained.

    Returns:
        The trained autoencoder.
    """
    finished = work / settings.name
    if not finished.exists():
        replicate(_train, cast, settings, work, start)
    return AutoencoderKLWan.from_pretrained(finished).eval()


def _train(
    cast: tuple[Actor, ...], settings: VideoVaeTraining, work: Path, start: Path | None
) -> None:
    """Trains one replica."""
    torch.manual_seed(settings.seed)
    vae = AutoencoderKLWan.from_pretrained(start) if start else new_video_vae()
    run = TrainingRun(
        settings.name,
        vae,
        _optimisers(vae, settings.learning_rate),
        work / f"{settings.name}.pt",
        minutes=settings.minutes,
        decay=1 - settings.pictures,
        seed=settings.seed,
    )
    torch.manual_seed(settings.seed + run.step + 1000 * rank())
    rng = random.Random(settings.seed + run.step + 1000 * rank())
    source = endless_clips(rng, cast, settings.close_ups)
    pool = np.stack([render_clip(cast, next(source)) for _ in range(settings.pool)])

    def losses() -> dict[str, float]:
        if run.step % 4 == 0:
            pool[rng.randrange(len(pool))] = render_clip(cast, next(source))
        return reconstruct(
            vae, to_video(random_crops(rng, pool, *crops_of(run, settings))), settings
        )

    average = run.until_done(losses).eval()
    if rank():
        return
    set_latent_statistics(average, cast)
    decibels = held_out_psnr(average, cast)
    print(f"{settings.name} {decibels:.2f} dB after {run.step} steps", flush=True)
    average.save_pretrained(work / settings.name)


def crops_of(run: TrainingRun, settings: VideoVaeTraining) -> tuple[int, int, int]:
    """Number, frames and side in pixels of the crops of the next step."""
    if run.clock.progress < settings.pictures:
        return 8, 1, 64
    return settings.crops[run.step % len(settings.crops)]


def reconstruct(
    vae: AutoencoderKLWan, target: Tensor, settings: VideoVaeTraining
) -> dict[str, float]:
    """Adds the gradients of one reconstruction of (B, 3, F, H, W) and returns its losses."""
    posterior = vae.encode(target).latent_dist
    latent = posterior.sample()
    latent = latent + settings.noise * latent.detach().std() * torch.randn_like(latent)
    output = decode_unclamped(vae, latent)
    squared = F.mse_loss(output, target)
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    pixel_loss = F.l1_loss(output, target) + 2 * squared
    loss = pixel_loss + settings.edges * edge_loss(output, target) + settings.kl * divergence
    loss.backward()
    return {"loss": loss.item(), "mse": squared.item(), "kl": divergence.item()}


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decodes as `vae.decode` does, without cutting values off, which would stop gradients."""
    vae.clear_cache()
    x = vae.post_quant_conv(latents)
    frames = []
    for index in range(x.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                x[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size)


def endless_clips(
    rng: random.Random, cast: tuple[Actor, ...], close_ups: float = 0.0
) -> Iterator[Clip]:
    """Yields every object and motion on random backgrounds, again and again, partly close."""
    while True:
        pairs = zip(every_clip(rng, cast), every_close_up(rng, cast), strict=True)
        yield from (close if rng.random() < close_ups else clip for clip, close in pairs)


def random_crops(
    rng: random.Random, pool: np.ndarray, count: int, frames: int, side: int
) -> np.ndarray:
    """Cuts (count, frames, side, side, 3) from random clips, some mirrored or reversed."""
    crops = []
    for _ in range(count):
        clip = pool[rng.randrange(len(pool))]
        y, x = (8 * rng.randint(0, (length - side) // 8) for length in clip.shape[1:3])
        start = rng.randint(0, len(clip) - frames)
        crop = clip[start : start + frames, y : y + side, x : x + side]
        crop = crop[:, :, ::-1] if rng.random() < 0.5 else crop
        crops.append(crop[::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, cast: tuple[Actor, ...], count: int = 12) -> None:
    """Writes the mean and deviation of every latent channel into the configuration."""
    clips = itertools.islice(endless_clips(random.Random(1), cast), count)
    latents = torch.cat(
        [vae.encode(to_video(render_clip(cast, clip)[None])).latent_dist.mode() for clip in clips]
    )
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, cast: tuple[Actor, ...], count: int = 8) -> float:
    """Mean PSNR in dB of reconstructed clips that no training sees."""
    total = 0.0
    for clip in held_out_clips(random.Random(HELD_OUT_SEED), cast)[:count]:
        target = to_video(render_clip(cast, clip)[None])
        output = vae.decode(vae.encode(target).latent_dist.mode()).sample
        total += -10 * math.log10(F.mse_loss(output / 2, target / 2).item())
    return total / count


def _optimisers(vae: AutoencoderKLWan, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions, AdamW for the ends, norms and biases."""
    ends = ("conv_in.weight", "conv_out.weight", "quant_conv.weight")
    inner, rest = [], []
    for name, weight in vae.named_parameters():
        is_inner = weight.ndim > 3 and name.endswith("weight") and not name.endswith(ends)
        (inner if is_inner else rest).append(weight)
    return [
        Muon(inner, learning_rate),
        torch.optim.AdamW(rest, 2 * learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
