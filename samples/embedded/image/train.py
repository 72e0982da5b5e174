"""Trains text encoders and transformer together as a rectified flow on cached latents."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from embedded.image.latents import GROUP, Chunk, PoolKind, draw_chunks, load_chunk, token_positions
from embedded.image.model import ImageModel
from embedded.scenes import caption, words_of
from embedded.training.run import TrainingRun, flow_optimisers, noise_levels, save
from embedded.vocabulary import Thing

# One arrangement per number of objects. At 0.5, the same training left shapes far coarser.
VARIETY = 0.0
WHOLE_128 = PoolKind("whole-128", 128, close_ups=False, seed=11, variety=VARIETY)
WHOLE_256 = PoolKind("whole-256", 256, close_ups=False, seed=12, variety=VARIETY)
PAIRS_128 = PoolKind(
    "pairs-128", 128, close_ups=False, seed=15, variety=VARIETY, shares=(0.0, 1.0, 0.0)
)
PAIRS_256 = PoolKind(
    "pairs-256", 256, close_ups=False, seed=14, variety=VARIETY, shares=(0.0, 1.0, 0.0)
)
MAIN_256 = PoolKind("main-256", 256, close_ups=False, seed=16, variety=VARIETY, main_only=True)
CLOSE_256 = PoolKind("close-256", 256, close_ups=True, seed=13, variety=VARIETY)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Name of its checkpoint.
        minutes: Wall-clock length.
        learning_rate: Peak rate of Muon; AdamW gets `adam_share` of it.
        whole: Pool of whole scenes.
        whole_chunks: Chunks of that pool.
        pairs: Pool of whole scenes with two objects that joins the other, if any.
        pair_chunks: Chunks of that pool.
        main: Pool of whole scenes of the main objects that joins too, if any.
        main_chunks: Chunks of that pool.
        batch: Whole scenes per step.
        close_ups: Pool of close-ups, if any.
        close_up_chunks: Chunks of that pool.
        close_up_groups: Windows per batch of close-ups, `GROUP` pictures each.
        close_up_every: Steps from one batch of close-ups to the next.
        noise_mean: Mean of the logit of the noise level; above 0 trains layout more.
        close_up_noise_mean: The same for close-ups; refinement starts from little noise.
        decay: Share of the stage over which the rate falls.
        average: Decay of the moving average of the weights.
        adam_share: Rate of AdamW in terms of that of Muon.
        text_share: The same for the layers of the text encoders.
        lengths: Words to which captions are padded, drawn at random.
        long_captions: Share of steps whose captions are padded to 512 words.
        seed: Seed of noise, captions and initial weights.
    """

    name: str
    minutes: float
    learning_rate: float
    whole: PoolKind
    whole_chunks: int
    batch: int
    pairs: PoolKind | None = None
    pair_chunks: int = 0
    main: PoolKind | None = None
    main_chunks: int = 0
    close_ups: PoolKind | None = None
    close_up_chunks: int = 0
    close_up_groups: int = 1
    close_up_every: int = 3
    noise_mean: float = 0.2
    close_up_noise_mean: float = -0.6
    decay: float = 0.6
    average: float = 0.99
    adam_share: float = 0.4
    text_share: float = 0.15
    lengths: tuple[int, ...] = (24, 32)
    long_captions: float = 0.02
    seed: int = 0

    @property
    def pools(self) -> tuple[tuple[PoolKind, int], ...]:
        """Pools of whole scenes, each with its number of chunks."""
        pools = (
            (self.whole, self.whole_chunks),
            (self.pairs, self.pair_chunks),
            (self.main, self.main_chunks),
        )
        return tuple((kind, count) for kind, count in pools if kind is not None)

    @property
    def close_up_pools(self) -> tuple[tuple[PoolKind, int], ...]:
        """The pool of close-ups with its number of chunks, or nothing."""
        return () if self.close_ups is None else ((self.close_ups, self.close_up_chunks),)


class Pool:
    """Chunks of latents in memory, served in random order without repetition.

    Args:
        chunks: What it holds.
        group: Neighbours that are served together because they share a window.
        rng: Source of chance.
    """

    def __init__(self, chunks: list[Chunk], group: int, rng: random.Random) -> None:
        self.latents = torch.cat([chunk.latents for chunk in chunks])
        self.scenes = [scene for chunk in chunks for scene in chunk.scenes]
        self.windows = [window for chunk in chunks for window in chunk.windows]
        self.group = group
        self.rng = rng
        self.order: list[int] = []

    def next_indices(self, count: int) -> list[int]:
        """Returns `count` indices, in whole groups."""
        chosen: list[int] = []
        while len(chosen) < count:
            if not self.order:
                self.order = list(range(0, len(self.scenes), self.group))
                self.rng.shuffle(self.order)
            first = self.order.pop()
            chosen += range(first, first + self.group)
        return chosen


def flow_loss(
    model: ImageModel,
    clean: Tensor,
    captions: list[str],
    length: int,
    positions: Tensor,
    noise_mean: float,
) -> Tensor:
    """Mean squared error of the predicted velocity at random noise levels.

    Args:
        model: What is trained.
        clean: Packed latents (B, N, 32).
        captions: Their captions.
        length: Words to which captions are padded.
        positions: (N, 3) token positions.
        noise_mean: Mean of the normal whose logistic is the noise level.
    """
    sigma = noise_levels(len(clean), noise_mean)
    noise = torch.randn_like(clean)
    mixed = torch.lerp(clean, noise, sigma[:, None, None])
    return (model(mixed, sigma, captions, length, positions) - (noise - clean)).square().mean()


def train_stage(
    vocabulary: tuple[Thing, ...],
    vae: AutoencoderKL,
    stage: Stage,
    work: Path,
    start: Path | None,
) -> Path:
    """Runs one stage, resuming from its checkpoint.

    Args:
        vocabulary: What the pictures show.
        vae: The frozen autoencoder.
        stage: How to train.
        work: Folder of checkpoints and latents.
        start: Averaged weights of the stage before, or the folder of a finished pipeline, whose
            vocabulary may differ; none to start untrained.

    Returns:
        File of the averaged weights.
    """
    finished = work / f"{stage.name}.pt"
    if finished.exists():
        return finished
    torch.manual_seed(stage.seed)
    model = ImageModel(words_of(vocabulary))
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
    batches = _batches(vocabulary, vae, stage, work, rng)

    def losses() -> dict[str, float]:
        length = 512 if rng.random() < stage.long_captions else rng.choice(stage.lengths)
        parts = next(batches)
        if length == 512:  # a few pictures do for these costly steps
            parts = [(name, x[:4], captions[:4], at) for name, x, captions, at in parts]
        total = sum(len(captions) for _, _, captions, _ in parts)
        found = {}
        for name, clean, captions, positions in parts:
            mean = stage.noise_mean if name == stage.whole.name else stage.close_up_noise_mean
            loss = flow_loss(model, clean, captions, length, positions, mean)
            (loss * len(captions) / total).backward()
            found[name] = loss.item()
        return found

    save(run.until_done(losses).state_dict(), finished)
    return finished


def _batches(
    vocabulary: tuple[Thing, ...],
    vae: AutoencoderKL,
    stage: Stage,
    work: Path,
    rng: random.Random,
) -> Iterator[list[tuple[str, Tensor, list[str], Tensor]]]:
    """Yields what a step trains on: name, latents, captions and positions of one or two parts."""
    scenes, windows = (
        [chunk for kind, count in pools for chunk in _chunks(vocabulary, vae, kind, count, work)]
        for pools in (stage.pools, stage.close_up_pools)
    )
    whole, close = Pool(scenes, 1, rng), Pool(windows, GROUP, rng) if windows else None
    for step in itertools.count():
        wanted = [(whole, stage.whole, stage.batch)]
        if close is not None and step % stage.close_up_every == 0:
            wanted += [(close, stage.close_ups, GROUP)] * stage.close_up_groups
        parts = []
        for pool, kind, count in wanted:
            indices = pool.next_indices(count)
            captions = [caption(rng, vocabulary, pool.scenes[i], pool.windows[i]) for i in indices]
            positions = token_positions(kind.pixels, pool.windows[indices[0]])
            parts.append((kind.name, pool.latents[indices].float(), captions, positions))
        yield parts


def _chunks(
    vocabulary: tuple[Thing, ...], vae: AutoencoderKL, kind: PoolKind, count: int, work: Path
) -> list[Chunk]:
    """Loads the chunks of a kind, drawing those that are missing."""
    draw_chunks(vocabulary, vae, kind, count, work)
    return [load_chunk(work, kind, index) for index in range(count)]
