"""Trains text encoder and video transformer together as a rectified flow on cached latents."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from embedded.training.run import TrainingRun, flow_optimisers, noise_levels, save
from embedded.video.clips import Actor, caption, words_of
from embedded.video.latents import load_latents
from embedded.video.model import VideoModel

FRAME_TOKENS = 64  # tokens of a latent frame
LENGTHS = (512, 512, 226, 64)  # rows to which callers pad captions; the first two are stock


@dataclass(frozen=True, slots=True)
class VideoStage:
    """One stage of training.

    Attributes:
        name: Name of its checkpoint.
        minutes: Wall-clock length.
        learning_rate: Peak rate of Muon; AdamW gets `adam_share` of it.
        chunks: Chunks of clips.
        tokens: Of all clips of a step.
        frames: First latent frames of its clips that a step trains on, taken in turn, 1 to 5.
        noise_mean: Mean of the logit of the noise level; above 0 trains layout more.
        close_ups: Chunks of close-ups, which teach what windows of larger clips show.
        close_up_every: Every how many steps it trains on close-ups, which are whole clips.
        close_up_noise_mean: The same for them: they follow a layout that is there.
        decay: Share of the stage over which the rate falls.
        average: Decay of the moving average of the weights.
        adam_share: Rate of AdamW in terms of that of Muon.
        text_share: The same for the layers of the text encoder.
        seed: Seed of noise, captions and initial weights.
    """

    name: str
    minutes: float
    learning_rate: float
    chunks: int
    tokens: int
    frames: tuple[int, ...] = (5,)
    noise_mean: float = 1.0
    close_ups: int = 0
    close_up_every: int = 4
    close_up_noise_mean: float = -0.3
    decay: float = 0.6
    average: float = 0.99
    adam_share: float = 0.4
    text_share: float = 0.15
    seed: int = 0


def flow_loss(
    model: VideoModel, clean: Tensor, captions: list[str], length: int, noise_mean: float
) -> Tensor:
    """Mean squared error of the predicted velocity at random noise levels.

    Args:
        model: What is trained.
        clean: Latents (B, C, F, h, w).
        captions: Their captions.
        length: Rows to which captions count as padded.
        noise_mean: Mean of the normal whose logistic is the noise level.
    """
    sigma = noise_levels(len(clean), noise_mean)
    noise = torch.randn_like(clean)
    mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    return (model(mixed, sigma, captions, length) - (noise - clean)).square().mean()


def train_video_stage(
    cast: tuple[Actor, ...],
    vae: AutoencoderKLWan,
    stage: VideoStage,
    work: Path,
    start: Path | None,
) -> Path:
    """Runs one stage, resuming from its checkpoint.

    Args:
        cast: What the clips show.
        vae: The frozen autoencoder.
        stage: How to train.
        work: Folder of checkpoints and latents.
        start: Averaged weights of the stage before, or the folder of a finished pipeline of the
            same vocabulary; none to start untrained.

    Returns:
        File of the averaged weights.
    """
    finished = work / f"{stage.name}.pt"
    if finished.exists():
        return finished
    data = load_latents(cast, vae, "clips", stage.chunks, work)
    close = (
        load_latents(cast, vae, "close-ups", stage.close_ups, work) if stage.close_ups else None
    )
    torch.manual_seed(stage.seed)
    model = VideoModel(words_of(cast))
    if start is not None and start.is_dir():
        model.adopt(start)
    elif start is not None:
        model.load_state_dict(torch.load(start, weights_only=True))
    run = TrainingRun(
        stage.name,
        model,
        flow_optimisers(model, stage.learning_rate, stage.adam_share, stage.text_share),
        work / f"{stage.name}-running.pt",
        minutes=stage.minutes,
        decay=stage.decay,
        average=stage.average,
        seed=stage.seed,
    )
    rng = random.Random(stage.seed + run.step)
    pools = [(data, _endless_order(len(data.clips), rng), stage.noise_mean)]
    if close is not None:
        pools.append((close, _endless_order(len(close.clips), rng), stage.close_up_noise_mean))

    def losses() -> dict[str, float]:
        is_close = close is not None and run.step % stage.close_up_every == 1
        pool, order, noise_mean = pools[is_close]
        frames = 5 if is_close else stage.frames[run.step % len(stage.frames)]
        chosen = list(itertools.islice(order, max(1, stage.tokens // (FRAME_TOKENS * frames))))
        clean = pool.latents[chosen, :, :frames].float()
        captions = [caption(rng, cast, pool.clips[index]) for index in chosen]
        loss = flow_loss(model, clean, captions, rng.choice(LENGTHS), noise_mean)
        loss.backward()
        return {"close-ups" if is_close else f"{frames}-frames": loss.item()}

    save(run.until_done(losses).state_dict(), finished)
    return finished


def _endless_order(total: int, rng: random.Random) -> Iterator[int]:
    """Yields indices in random order, every one once before any repeats."""
    while True:
        yield from rng.sample(range(total), total)
