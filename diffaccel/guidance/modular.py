"""The same guidance for modular pipelines, as one of diffusers' guiders."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from diffaccel.guidance.attachment import check_layers
from diffaccel.guidance.perturb.blocks import PermuteTokens, SkipLayers
from diffaccel.guidance.perturb.damage import Damage, Perturbation
from diffaccel.guidance.perturb.heads import HeadPerturbation

if TYPE_CHECKING:
    from diffusers.modular_pipelines.modular_pipeline import BlockState

KINDS = {kind.__name__: kind for kind in (HeadPerturbation, SkipLayers, PermuteTokens)}


class PerturbationGuider(BaseGuidance):
    """Classifier-free guidance plus guidance away from the damaged model.

    With the predictions c (prompt), u (empty prompt) and p (prompt, damaged model):
    u + g (c - u) + w (c - p); without classifier-free guidance c + w (c - p).

    Unlike `set_guidance` it cannot share the first layers between c and p.

    Args:
        perturbation: What is damaged, see `diffaccel.set_guidance`; or the dictionary of its
            configuration with its class under "kind".
        guidance_scale: g; 1 switches classifier-free guidance off.
        perturbation_scale: w; 0 switches this guidance off.
        perturbation_start: Share of the steps before which w counts as 0.
        perturbation_stop: Share of the steps from which on w counts as 0.
        start: The same for classifier-free guidance.
        stop: The same for classifier-free guidance.
        enabled: Whether to guide at all.

    Example:
        >>> pipe.update_components(guider=PerturbationGuider(HeadPerturbation(layers=(8,))))
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_cond_perturbed"]

    @register_to_config
    def __init__(
        self,
        perturbation: Perturbation | dict[str, Any],
        guidance_scale: float = 7.5,
        perturbation_scale: float = 3.0,
        perturbation_start: float = 0.0,
        perturbation_stop: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        if isinstance(perturbation, dict):
            settings = dict(perturbation)
            perturbation = KINDS[settings.pop("kind")](**settings)
        self.perturbation = perturbation
        settings = {"kind": type(perturbation).__name__, **asdict(perturbation)}
        # diffusers takes arguments given by position for defaults, which copies leave out.
        defaults = [
            name for name in self.config.get("_use_default_values", ()) if name != "perturbation"
        ]
        self.register_to_config(perturbation=settings, _use_default_values=defaults)
        self.guidance_scale = guidance_scale
        self.perturbation_scale = perturbation_scale
        self._window = (perturbation_start, perturbation_stop)
        self._damage: Damage | None = None
        self._damaging = ExitStack()

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Damages the denoiser before the last of the calls of a step."""
        self._count_prepared += 1
        if self._perturbs() and self._count_prepared == self.num_conditions:
            check_layers("", denoiser, self.perturbation)
            if self._damage is None or not self._damage.is_on(denoiser):
                self._damage = Damage(denoiser, self.perturbation)
                weakref.finalize(self, self._damage.remove)
            self._damaging.enter_context(self._damage.active(denoiser, self._step or 0))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Mends it again."""
        self._damaging.close()

    def prepare_inputs(self, data: dict[str, Any]) -> list[BlockState]:
        """Returns the inputs of each call of a step."""
        return [self._prepare_batch(data, index, name) for index, name in self._calls()]

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, Any]
    ) -> list[BlockState]:
        """Returns the inputs of each call of a step."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in self._calls()
        ]

    def forward(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None = None,
        pred_cond_perturbed: Tensor | None = None,
    ) -> GuiderOutput:
        """Combines the predictions of a step."""
        pred = pred_cond
        if pred_uncond is not None:
            pred = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_cond_perturbed is not None:
            pred = pred + self.perturbation_scale * (pred_cond - pred_cond_perturbed)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the present call is for the prompt."""
        return not (self._uses_empty_prompt() and self._count_prepared == 2)

    @property
    def num_conditions(self) -> int:
        """Calls of the present step."""
        return len(self._calls())

    def _calls(self) -> list[tuple[int, str]]:
        """Which inputs each call takes, 0 for the prompt, and what it is for."""
        calls = [(0, "pred_cond")]
        if self._uses_empty_prompt():
            calls.append((1, "pred_uncond"))
        if self._perturbs():
            calls.append((0, "pred_cond_perturbed"))
        return calls

    def _uses_empty_prompt(self) -> bool:
        return (
            self._enabled and self.guidance_scale != 1.0 and self._within(self._start, self._stop)
        )

    def _perturbs(self) -> bool:
        active = self.perturbation_scale != 0 and getattr(self.perturbation, "strength", 1.0) != 0
        return self._enabled and active and self._within(*self._window)

    def _within(self, start: float, stop: float) -> bool:
        steps = self._num_inference_steps
        return steps is None or start <= self._step / steps < stop
