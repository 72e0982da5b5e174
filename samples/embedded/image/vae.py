"""Trains the autoencoder (f8, 8 latent channels) on crops of vector scenes."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from embedded.scenes import random_scene, random_window, render
from embedded.training.clock import Clock
from embedded.training.muon import Muon
from embedded.vocabulary import Thing

HELD_OUT_SEED = 977


@dataclass(frozen=True, slots=True)
class VaeTraining:
    """How the autoencoder is trained.

    Attributes:
        minutes: Wall-clock length.
        learning_rate: Peak rate of Muon (inner convolutions) and AdamW (the rest).
        pixels_per_step: Batch size times crop area.
        pool: Pictures of 256 px held in memory; one is redrawn each step.
        kl: Weight of the mean Kullback-Leibler term, small: it only keeps latents smooth.
        noise: Deviation of noise on the latents in terms of theirs, so that the decoder bears
            the errors of the diffusion model.
        edges: Weight of the L1 distance of picture gradients.
        seed: Seed of the pictures and of the weights.
    """

    minutes: float = 15.0
    learning_rate: float = 2e-3
    pixels_per_step: int = 8 * 64 * 64
    pool: int = 1200
    kl: float = 1e-3
    noise: float = 0.08
    edges: float = 0.5
    seed: int = 0


def new_vae() -> AutoencoderKL:
    """Builds the untrained autoencoder, about 80k multiply-adds per decoded pixel.

    One normalisation group, since narrow groups erase the colour of flat areas. The residual
    branches start at zero and the remaining path keeps the size of its signal, so that training
    starts from an almost linear codec.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=256,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d):
                _initialise(name, module)
        log_variance = slice(vae.config.latent_channels, None)
        vae.encoder.conv_out.weight[log_variance].mul_(0.1)
        vae.encoder.conv_out.bias[log_variance].fill_(-5.0)
    return vae


def _initialise(name: str, convolution: nn.Conv2d) -> None:
    """Sets a convolution to zero, to an orthogonal map of pixels, or to unit-gain noise."""
    weight = convolution.weight
    convolution.bias.zero_()
    if name.endswith("conv2"):
        weight.zero_()
    elif name.endswith(("conv_in", "conv_shortcut")) or "upsamplers" in name:
        outputs, inputs, side, _ = weight.shape
        centre = torch.empty(outputs, inputs)
        nn.init.orthogonal_(centre, gain=max(1.0, (outputs / inputs) ** 0.5))
        weight.mul_(0.3)
        weight[:, :, side // 2, side // 2] += centre
    elif not name.endswith("conv1"):
        nn.init.normal_(weight, 0.0, weight[0].numel() ** -0.5)


def random_picture(
    rng: random.Random, vocabulary: tuple[Thing, ...], pixels: int = 256
) -> np.ndarray:
    """Draws a scene, or in two of five cases a close-up of one at 2 to 16 times its size."""
    scene = random_scene(rng, vocabulary)
    window = None
    if rng.random() < 0.4:
        window = random_window(rng, scene, rng.choice((2, 3, 4, 6, 8, 16)))
    return render(vocabulary, scene, pixels, window)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Turns (B, H, W, 3) bytes into (B, 3, H, W) floats in [-1, 1], channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical differences."""
    error = output - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, vocabulary: tuple[Thing, ...], count: int = 48) -> float:
    """Mean PSNR in dB of reconstructed whole scenes at 256 px that training did not see."""
    rng = random.Random(HELD_OUT_SEED)
    total = 0.0
    for _ in range(count):
        picture = render(vocabulary, random_scene(rng, vocabulary), 256)
        target = to_tensor(picture[None])
        latent = vae.encode(target).latent_dist.mode()
        output = vae.decode(latent).sample.clamp(-1, 1)
        total += -10 * torch.log10(F.mse_loss(output, target) / 4).item()
    return total / count


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKL, vocabulary: tuple[Thing, ...]) -> None:
    """Stores shift and scale in the configuration so that latents have mean 0, deviation 1."""
    rng = random.Random(HELD_OUT_SEED + 1)
    pictures = [random_picture(rng, vocabulary) for _ in range(96)]
    latents = torch.cat([vae.encode(to_tensor(p[None])).latent_dist.mode() for p in pictures])
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item()
    )


def train_vae(vocabulary: tuple[Thing, ...], settings: VaeTraining, work: Path) -> AutoencoderKL:
    """Trains the autoencoder, resuming from `work`/vae.pt, and saves it to `work`/vae.

    Args:
        vocabulary: What the pictures show.
        settings: How to train.
        work: Folder of checkpoints.

    Returns:
        The trained autoencoder.
    """
    finished = work / "vae"
    if finished.exists():
        return AutoencoderKL.from_pretrained(finished)
    torch.manual_seed(settings.seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimisers = _optimisers(vae, settings.learning_rate)
    checkpoint = work / "vae.pt"
    spent_s, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        spent_s, step = state["spent_s"], state["step"]
    rng = random.Random(settings.seed + step)
    pool = np.stack([random_picture(rng, vocabulary) for _ in range(settings.pool)])
    clock = Clock(settings.minutes, spent_s)
    while clock.progress < 1:
        clock.tick()
        pool[step % settings.pool] = random_picture(rng, vocabulary)
        target = to_tensor(_random_crops(rng, pool, settings.pixels_per_step))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * clock.rate()
        posterior = vae.encode(target).latent_dist
        latent = posterior.sample()
        latent = latent + settings.noise * latent.detach().std() * torch.randn_like(latent)
        output = vae.decode(latent).sample
        pixel_loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = pixel_loss + settings.edges * edge_loss(output, target) + settings.kl * kl
        vae.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        if step % 50 == 0:
            mse = F.mse_loss(output.detach(), target).item()
            print(
                f"vae step {step} {clock.spent_s / 60:.1f} min loss {loss.item():.4f} "
                f"mse {mse:.5f} kl {kl.item():.2f}",
                flush=True,
            )
        if step % 500 == 0:
            state = {
                "vae": vae.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "spent_s": clock.spent_s,
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    vae = vae.eval()
    set_latent_statistics(vae, vocabulary)
    print(f"vae held-out PSNR {held_out_psnr(vae, vocabulary):.2f} dB after {step} steps")
    vae.save_pretrained(finished)
    return vae


def _optimisers(vae: AutoencoderKL, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions, AdamW for the ends, norms and biases."""
    ends = ("conv_in.weight", "conv_out.weight")
    inner, rest = [], []
    for name, weight in vae.named_parameters():
        (inner if weight.ndim == 4 and not name.endswith(ends) else rest).append(weight)
    return [
        Muon(inner, learning_rate),
        torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _random_crops(rng: random.Random, pool: np.ndarray, pixels: int) -> np.ndarray:
    """Cuts a batch of equal squares of 64, 96 or 128 px from random pictures."""
    side = rng.choice((64, 64, 96, 128))
    crops = []
    for _ in range(max(1, pixels // side**2)):
        picture = pool[rng.randrange(len(pool))]
        # Multiples of 8, so that edges do not depend on the crop; off-grid ones come from scenes.
        y, x = (8 * rng.randint(0, (picture.shape[0] - side) // 8) for _ in range(2))
        crop = picture[y : y + side, x : x + side]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops)
