"""Trains text encoder and U-Net together to predict velocities on cached latents."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from embedded.image.latents import GROUP, Chunk, PoolKind, draw_chunks, load_chunk
from embedded.image.train import (
    CLOSE_256,
    PAIRS_128,
    PAIRS_256,
    WHOLE_128,
    WHOLE_256,
    Pool,
)
from embedded.scenes import caption, words_of
from embedded.training.run import TrainingRun, muon_and_adam, save
from embedded.unet.model import UNetModel
from embedded.vocabulary import Thing

SCORES = (".to_q.", ".to_k.")  # projections whose products are the logits of attention


@dataclass(frozen=True, slots=True)
class UNetTraining:
    """How the U-Net is trained.

    Attributes:
        minutes: Wall-clock length.
        name: Of its files in the work folder.
        is_coarse: Whether the U-Net lacks its finest level.
        learning_rate: Peak rate of Muon; AdamW gets `adam_share` of it.
        pools: Pools of whole scenes, each with its number of chunks.
        batch: Whole scenes per step.
        close_ups: Pool of close-ups, for refining enlarged pictures, with its number of chunks.
        close_up_batch: Close-ups per step that has some; a multiple of `GROUP`.
        close_up_every: Steps from one batch of close-ups to the next.
        close_up_from: Share of the run after which close-ups begin.
        noise_tilt: Density of the noise level rises with this power of the timestep: above 0
            trains layout more.
        close_up_noise_tilt: The same for close-ups; refinement starts from little noise.
        decay: Share of the run over which the rate falls.
        average: Decay of the moving average of the weights.
        adam_share: Rate of AdamW in terms of that of Muon.
        text_share: The same for the layers of the text encoder and for the scores of attention.
        save_every: Steps from one checkpoint to the next.
        seed: Seed of noise, captions and initial weights.
    """

    minutes: float
    name: str = "unet"
    is_coarse: bool = False
    learning_rate: float = 2e-3
    pools: tuple[tuple[PoolKind, int], ...] = ((WHOLE_256, 8), (PAIRS_256, 4))
    batch: int = 16
    close_ups: tuple[PoolKind, int] | None = (CLOSE_256, 3)
    close_up_batch: int = 2 * GROUP
    close_up_every: int = 4
    close_up_from: float = 0.4
    noise_tilt: float = 0.7
    close_up_noise_tilt: float = -0.3
    decay: float = 0.7
    average: float = 0.99
    adam_share: float = 0.4
    text_share: float = 0.15
    save_every: int = 100
    seed: int = 0


def coarse_training(minutes: float) -> UNetTraining:
    """Settings of the stage before: small pictures, which go by 3.7 times as fast."""
    return UNetTraining(
        minutes,
        name="unet-coarse",
        is_coarse=True,
        learning_rate=3e-3,
        pools=((WHOLE_128, 20), (PAIRS_128, 10)),
        batch=48,
        close_ups=None,
    )


def unpack(packed: Tensor) -> Tensor:
    """Arranges packed latents (B, N, 32) of a square picture as (B, 8, h, w); undoes `pack`."""
    count, tokens, width = packed.shape
    side = round(tokens**0.5)
    grid = packed.view(count, side, side, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(count, width // 4, 2 * side, 2 * side)


def draw_timesteps(count: int, tilt: float, steps: int = 1000) -> Tensor:
    """Draws (count,) timesteps whose density rises with their power `tilt`.

    Stratified over the batch, so that the loss of a step depends less on chance.
    """
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    return (uniform ** (1 / (1 + tilt)) * steps).long().clamp(max=steps - 1)


def velocity_loss(model: UNetModel, clean: Tensor, captions: list[str], tilt: float) -> Tensor:
    """Mean squared error of the predicted velocity at random noise levels.

    Args:
        model: What is trained.
        clean: Latents (B, 8, h, w).
        captions: Their captions.
        tilt: Of the density of noise levels, see `draw_timesteps`.
    """
    timesteps = draw_timesteps(len(clean), tilt)
    noise = torch.randn_like(clean)
    noisy = model.scheduler.add_noise(clean, noise, timesteps)
    target = model.scheduler.get_velocity(clean, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, captions), target)


def draw_latents(
    vocabulary: tuple[Thing, ...], vae: AutoencoderKL, settings: UNetTraining, work: Path
) -> None:
    """Draws and encodes the pictures that are missing in `work`/latents."""
    for kind, count in (*settings.pools, *([settings.close_ups] if settings.close_ups else [])):
        draw_chunks(vocabulary, vae, kind, count, work)


def train_unet(
    vocabulary: tuple[Thing, ...],
    vae: AutoencoderKL,
    settings: UNetTraining,
    work: Path,
    start: Path | None = None,
    coarse: Path | None = None,
) -> Path:
    """Trains the model, resuming from `work`/NAME-running.pt.

    Args:
        vocabulary: What the pictures show.
        vae: The frozen autoencoder.
        settings: How to train.
        work: Folder of checkpoints and latents.
        start: Weights of an earlier training, or the folder of a finished pipeline, whose
            vocabulary may differ; none to start untrained.
        coarse: Weights of the coarse stage to start from instead.

    Returns:
        File of the averaged weights ("average") and the number of steps ("step").
    """
    finished = work / f"{settings.name}.pt"
    if finished.exists():
        return finished
    draw_latents(vocabulary, vae, settings, work)
    torch.manual_seed(settings.seed)
    model = UNetModel(words_of(vocabulary), settings.is_coarse)
    if coarse is not None:
        model.grow(torch.load(coarse, weights_only=True)["average"])
    elif start is not None and start.is_dir():
        model.adopt(start)
    elif start is not None:
        model.load_state_dict(torch.load(start, weights_only=True)["average"])
    run = TrainingRun(
        settings.name,
        model,
        optimisers_of(model, settings),
        work / f"{settings.name}-running.pt",
        minutes=settings.minutes,
        decay=settings.decay,
        average=settings.average,
        seed=settings.seed,
        save_every=settings.save_every,
    )
    rng = random.Random(settings.seed + run.step)
    batches = _batches(vocabulary, settings, work, rng)

    def losses() -> dict[str, float]:
        has_close_ups = (
            settings.close_ups is not None
            and run.step % settings.close_up_every == 0
            and run.clock.progress >= settings.close_up_from
        )
        return train_on(model, next(batches)[: 2 if has_close_ups else 1], settings)

    average = run.until_done(losses)
    save({"average": average.state_dict(), "step": run.step}, finished)
    return finished


def train_on(
    model: UNetModel, parts: list[tuple[Tensor, list[str]]], settings: UNetTraining
) -> dict[str, float]:
    """Computes the gradients of one step.

    Args:
        model: What is trained.
        parts: Latents (B, 8, h, w) and captions of whole scenes, then of close-ups, if any.
        settings: How to train.

    Returns:
        The loss of each part by its name.
    """
    total = sum(len(captions) for _, captions in parts)
    names = ("whole", "close-ups")
    tilts = (settings.noise_tilt, settings.close_up_noise_tilt)
    shown = {}
    for name, tilt, (clean, captions) in zip(names, tilts, parts, strict=False):
        clean = clean.float().contiguous(memory_format=torch.channels_last)
        loss = velocity_loss(model, clean, captions, tilt)
        (loss * len(captions) / total).backward()
        shown[name] = loss.item()
    return shown


def optimisers_of(model: UNetModel, settings: UNetTraining) -> list[torch.optim.Optimizer]:
    """Muon for convolutions and matrices of the blocks, AdamW for everything else.

    The layers of the text encoder and the scores of attention, which nothing normalises, get a
    low rate and AdamW: under Muon they saturate to one-hot rows.
    """
    inner, careful, rest = [], [], []
    for name, weight in model.named_parameters():
        if name.startswith("text_encoder.") and "layers" in name:
            careful.append(weight)
        elif any(part in name for part in SCORES):
            careful.append(weight)
        elif weight.ndim >= 2 and "_blocks." in name and "time_emb" not in name:
            inner.append(weight)
        else:
            rest.append(weight)
    rate = settings.learning_rate
    rates = (rate, settings.text_share * rate, settings.adam_share * rate)
    return muon_and_adam(inner, careful, rest, rates)


def _batches(
    vocabulary: tuple[Thing, ...], settings: UNetTraining, work: Path, rng: random.Random
) -> Iterator[list[tuple[Tensor, list[str]]]]:
    """Yields latents and captions of whole scenes, then of close-ups where there is a pool."""
    wanted = [(Pool(_chunks(work, *settings.pools), 1, rng), settings.batch)]
    if settings.close_ups is not None:
        close = Pool(_chunks(work, settings.close_ups), GROUP, rng)
        wanted.append((close, settings.close_up_batch))
    while True:
        parts = []
        for pool, count in wanted:
            indices = pool.next_indices(count)
            captions = [caption(rng, vocabulary, pool.scenes[i], pool.windows[i]) for i in indices]
            parts.append((unpack(pool.latents[indices]), captions))
        yield parts


def _chunks(work: Path, *pools: tuple[PoolKind, int]) -> list[Chunk]:
    """Loads the chunks of some pools."""
    return [load_chunk(work, kind, index) for kind, count in pools for index in range(count)]
