"""Trains the scorer: in a batch, pictures are to find their captions, and captions theirs."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.scenes import Scene, words_of
from embedded.scorer.model import Scorer
from embedded.scorer.pictures import (
    FOUR,
    as_input,
    draw_all_pictures,
    fitting,
    load_pictures,
    told_caption,
    worn,
)
from embedded.training.run import TrainingRun, muon_and_adam, save
from embedded.vocabulary import Thing


@dataclass(frozen=True, slots=True)
class ScorerTraining:
    """How the scorer is trained.

    Attributes:
        minutes: Wall-clock length.
        learning_rate: Peak rate of Muon; AdamW gets `adam_share` of it.
        chunks: Chunks of pictures.
        groups: Groups of four pictures in a chunk.
        batch_groups: Groups in a batch.
        decay: Share of the run over which the rate falls.
        average: Decay of the moving average of the weights.
        adam_share: Rate of AdamW in terms of that of Muon.
        save_every: Steps from one checkpoint to the next.
        seed: Seed of captions, wear and initial weights.
    """

    minutes: float
    learning_rate: float = 3e-3
    chunks: int = 6
    groups: int = 1000
    batch_groups: int = 32
    decay: float = 0.7
    average: float = 0.99
    adam_share: float = 0.3
    save_every: int = 200
    seed: int = 0


def contrastive_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """Symmetric InfoNCE that leaves out what fits besides the own partner.

    Args:
        logits: (B, B), pictures in rows and captions in columns.
        fits: (B, B) bool, where picture and caption fit.
    """
    others = fits & ~torch.eye(len(fits), dtype=torch.bool)
    logits = logits.masked_fill(others, -torch.inf)
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_scorer(vocabulary: tuple[Thing, ...], settings: ScorerTraining, work: Path) -> Path:
    """Trains the scorer, resuming from `work`/scorer-running.pt.

    Args:
        vocabulary: What the pictures show.
        settings: How to train.
        work: Folder of checkpoints and pictures.

    Returns:
        File of the averaged weights ("average") and the number of steps ("step").
    """
    finished = work / "scorer.pt"
    if finished.exists():
        return finished
    draw_all_pictures(vocabulary, settings.chunks, work, settings.groups)
    pool = load_pictures(work, settings.chunks)
    torch.manual_seed(settings.seed)
    model = Scorer(words_of(vocabulary))
    run = TrainingRun(
        "scorer",
        model,
        optimisers_of(model, settings),
        work / "scorer-running.pt",
        minutes=settings.minutes,
        decay=settings.decay,
        average=settings.average,
        seed=settings.seed,
        save_every=settings.save_every,
    )
    rng = random.Random(settings.seed + run.step)

    def losses() -> dict[str, float]:
        groups = rng.sample(range(len(pool.scenes) // FOUR), settings.batch_groups)
        places = [FOUR * group + place for group in groups for place in range(FOUR)]
        scenes = [pool.scenes[place] for place in places]
        return train_on(model, rng, vocabulary, pool.pictures[places], scenes)

    average = run.until_done(losses)
    save({"average": average.state_dict(), "step": run.step}, finished)
    return finished


def train_on(
    model: Scorer,
    rng: random.Random,
    vocabulary: tuple[Thing, ...],
    pictures: Tensor,
    scenes: list[Scene],
) -> dict[str, float]:
    """Computes the gradients of one step.

    Args:
        model: What is trained.
        rng: Source of captions.
        vocabulary: What the pictures show.
        pictures: (B, 64, 64, 3), uint8.
        scenes: The B scenes that they show.

    Returns:
        The loss, and the share of pictures whose own caption scores highest.
    """
    told = [told_caption(rng, vocabulary, scene) for scene in scenes]
    fits = fitting(scenes, [tells_ground for _, tells_ground in told])
    model.limit_scale()
    logits = model(worn(as_input(pictures)), [text for text, _ in told])
    loss = contrastive_loss(logits, fits)
    loss.backward()
    found = fits[torch.arange(len(fits)), logits.argmax(1)]
    return {"loss": loss.item(), "found": found.float().mean().item()}


def optimisers_of(model: Scorer, settings: ScorerTraining) -> list[torch.optim.Optimizer]:
    """Muon for the picture encoder's matrices but those of attention scores, AdamW for the rest.

    Under Muon the text encoder and the scores of attention, which nothing normalises, saturate.
    """
    inner, matrices, rest = [], [], []
    for name, weight in model.named_parameters():
        is_score = ".q_proj." in name or ".k_proj." in name
        if "vision_model" in name and "layers" in name and weight.ndim == 2 and not is_score:
            inner.append(weight)
        else:
            (matrices if weight.ndim == 2 and "layers" in name else rest).append(weight)
    rate = settings.adam_share * settings.learning_rate
    return muon_and_adam(inner, matrices, rest, (settings.learning_rate, rate, rate))
