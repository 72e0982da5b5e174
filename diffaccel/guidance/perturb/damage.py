"""A perturbation on one denoiser, switched on and off."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.attach.attachment import (
    add_attention_hook,
    check_hookable,
    remove_attention_hook,
)
from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.bindings import Binding, binding_of
from diffaccel.errors import ModelError
from diffaccel.guidance.perturb.blocks import PermuteTokens, SkipLayers
from diffaccel.guidance.perturb.heads import HeadPerturbation

Perturbation = HeadPerturbation | SkipLayers | PermuteTokens


def _nothing() -> None:
    return None


class Damage:
    """A perturbation of a denoiser that is off until `active` switches it on.

    Args:
        model: The denoiser. A method that it has stays.
        perturbation: What is damaged.

    Attributes:
        hooked: Paths of the layers at whose attention it acts.
    """

    def __init__(self, model: nn.Module, perturbation: Perturbation) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._perturbation: Any = perturbation
        self._binding = binding_of(model)
        self._layers = self._binding.layers(model)
        self._hook: DamagedHeads | None = None
        if isinstance(perturbation, PermuteTokens):
            touched = [self._layers[index].name for index in perturbation.layers]
            _refuse_mixed(model, self._binding, touched)
        self.hooked: tuple[str, ...] = ()
        if isinstance(perturbation, HeadPerturbation):
            self._hook = DamagedHeads(perturbation)
            self.hooked = tuple(self._layers[index].name for index in perturbation.touched)
            check_hookable(model, self.hooked)
            add_attention_hook(model, self._hook, self.hooked)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": _nothing}

    def __deepcopy__(self, memo: dict) -> Damage:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        model = memo.get(id(self._model()))
        if model is not None:
            copied._model = weakref.ref(model)
        return copied

    def is_on(self, model: nn.Module) -> bool:
        """Whether it damages this denoiser."""
        return self._model() is model

    @contextmanager
    def active(self, model: nn.Module, step: int) -> Iterator[None]:
        """While active, the denoiser is damaged as it is at a denoising step."""
        if self._hook is None:
            with self._perturbation.applied(model, self._binding, self._layers, step):
                yield
            return
        self._hook.is_active = True
        try:
            yield
        finally:
            self._hook.is_active = False

    def remove(self) -> None:
        """Takes it off the denoiser."""
        model = self._model()
        if model is not None and self._hook is not None:
            remove_attention_hook(model, self._hook)


def _refuse_mixed(model: nn.Module, binding: Binding, names: list[str]) -> None:
    """Raises ModelError where text would be shuffled with the visual tokens, or images come."""
    for name in names:
        has_images = binding.blocks_of_images
        if has_images or re.fullmatch(binding.mixes_text, name):
            raise ModelError(
                f"PermuteTokens needs blocks that get visual tokens alone, those of {name} in "
                f"{type(model).__name__} get {'images' if has_images else 'text too'}; use other "
                "layers, or SkipLayers"
            )


class DamagedHeads(AttentionHook):
    """Damages heads of whatever computes the attention of a layer."""

    def __init__(self, perturbation: HeadPerturbation) -> None:
        self._perturbation = perturbation

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        output = compute(call)
        if call.is_cross_attention or call.is_text_part:
            return output
        inputs, rows = call.inputs(), call.completed(output)
        dim = rows.shape[-1]
        rows = F.pad(rows, (0, inputs.query.shape[-1] - dim))  # heads may carry a bias of keys
        return call.asked(self._perturbation.perturb(inputs, rows, call.layer.index))[..., :dim]
