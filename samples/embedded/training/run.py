"""One training run: optimisers, schedule, moving average, and a checkpoint to resume from."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from embedded.training.clock import Clock
from embedded.training.muon import Muon
from embedded.training.replicas import average_over_replicas, rank


def save(content: object, path: Path) -> None:
    """Writes a file beside and renames it."""
    torch.save(content, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def noise_levels(count: int, mean: float) -> Tensor:
    """Draws noise levels (count,) in 0 to 1: the logistic of a normal of deviation 1.

    They are stratified, so that the loss of a step depends less on chance.
    """
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    return torch.sigmoid(mean + torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))


def flow_optimisers(
    model: nn.Module, learning_rate: float, adam_share: float, text_share: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else.

    Under Muon the text encoders, which scale no logits and whose words are a few hundred times
    rarer than pixels, saturate: attention of one-hot rows through which nothing is learned, and
    outputs in which a word drowns in the sentence around it.

    Args:
        model: Its text encoders are called `text_encoder…`.
        learning_rate: Of Muon.
        adam_share: Rate of AdamW in terms of that of Muon.
        text_share: The same for the layers of the text encoders.
    """
    inner, text, rest = [], [], []
    for name, weight in model.named_parameters():
        block = "block" in name or "layers" in name
        if name.startswith("text_encoder"):
            (text if block else rest).append(weight)
        elif weight.ndim == 2 and block and ".linear." not in name:
            inner.append(weight)
        else:
            rest.append(weight)
    rates = (learning_rate, text_share * learning_rate, adam_share * learning_rate)
    return muon_and_adam(inner, text, rest, rates)


def muon_and_adam(
    inner: list[Tensor], careful: list[Tensor], rest: list[Tensor], rates: tuple[float, ...]
) -> list[torch.optim.Optimizer]:
    """Muon for inner matrices, AdamW with decay for careful ones and without for the rest.

    Args:
        inner: What Muon trains.
        careful: Matrices that saturate under Muon.
        rest: Embeddings, norms, biases, ends.
        rates: Peak learning rate of each of the three.
    """
    return [
        Muon(inner, rates[0], weight_decay=0.02),
        torch.optim.AdamW(
            [
                {"params": careful, "lr": rates[1], "weight_decay": 0.1},
                {"params": rest, "lr": rates[2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        ),
    ]


class TrainingRun:
    """Counts steps and time, sets rates, averages weights and saves all of it.

    Args:
        name: Of the run, in what is printed.
        model: What is trained.
        optimisers: Of its weights, at their peak rates.
        checkpoint: File to resume from, if it exists, and to save to.
        minutes: Wall-clock length.
        decay: Share of the run over which the rate falls.
        average: Decay of the moving average of the weights.
        seed: Seed of noise; a resumed run draws other noise.
        save_every: Steps from one checkpoint to the next.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimisers: list[torch.optim.Optimizer],
        checkpoint: Path,
        *,
        minutes: float,
        decay: float = 0.6,
        average: float = 0.99,
        seed: int = 0,
        save_every: int = 100,
    ) -> None:
        self.name, self.model, self.optimisers = name, model, optimisers
        self.checkpoint, self.save_every = checkpoint, save_every
        self.average, self.average_decay = copy.deepcopy(model), average
        self.step = 0
        self.losses: dict[str, float] = {}
        self.peaks = [[group["lr"] for group in o.param_groups] for o in optimisers]
        spent_s = 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            spent_s, self.step = state["spent_s"], state["step"]
            torch.manual_seed(seed + self.step)
        self.clock = Clock(minutes, spent_s, decay=decay)

    def until_done(self, losses: Callable[[], dict[str, float]]) -> nn.Module:
        """Takes steps until the time is over.

        Args:
            losses: Computes the gradients of one step and returns what it wants to be shown.

        Returns:
            The averaged model.
        """
        while self.clock.progress < 1:
            self.take_step(losses)
        if not rank():
            self.save()
        return self.average

    def take_step(self, losses: Callable[[], dict[str, float]]) -> None:
        """Takes one step, see `until_done`."""
        for optimiser, peaks in zip(self.optimisers, self.peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * self.clock.rate()
        self.model.zero_grad(set_to_none=True)
        for name, value in losses().items():
            self.losses[name] = 0.98 * self.losses.get(name, value) + 0.02 * value
        self.clock.tick()
        self.clock.spent_s = average_over_replicas(self.model, self.clock.spent_s)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        self._average_weights()
        if rank():
            return
        if self.step % 20 == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
            minutes = self.clock.spent_s / 60
            print(f"{self.name} step {self.step} {minutes:.1f} min {shown}", flush=True)
        if self.step % self.save_every == 0:
            self.save()

    def save(self) -> None:
        """Writes the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "spent_s": self.clock.spent_s,
            "step": self.step,
        }
        save(state, self.checkpoint)

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Moves the average towards the weights, quickly at first."""
        decay = min(self.average_decay, self.step / (self.step + 10))
        for old, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            old.lerp_(new, 1 - decay)
