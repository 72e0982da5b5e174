"""Guidance away from a negative prompt inside of attention, on one denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.attach.attachment import (
    add_attention_hook,
    check_hookable,
    remove_attention_hook,
)
from diffaccel.attach.caches import CACHE_DIT, caches_of, refuse_caches
from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.attach.seam import AttachedLayer
from diffaccel.bindings import binding_of
from diffaccel.bindings.base import forward_signature
from diffaccel.errors import ModelError
from diffaccel.guidance.guide import (
    GuidanceState,
    Guide,
    on_batch,
    prediction_of,
    unconsumed,
    with_prediction,
)
from diffaccel.guidance.normalized.config import NormalizedAttention
from diffaccel.guidance.normalized.negative_prompt import (
    lengthened,
    masks_of,
    negative_prompt_of,
)
from diffaccel.layout import TokenLayout

READS_ROWS = frozenset({CACHE_DIT, "faster_cache", "first_block_cache", "sea_cache"})
"""Caches that decide by the values of a whole batch, or take a half of it for the empty prompt."""

STORES = ("kv_cache", "kv_caches", "kv_cache_mode")
"""Arguments that tell of keys of reference images, which a run keeps from its first step on."""


class NormalizedGuide(Guide, AttentionHook):
    """What both kinds have in common: they act at the attention of some layers.

    Args:
        state: Of the pipeline's guidance.
        model: The denoiser.
        perturbation: Limits, blend and the negative prompt.
        scale: w.
        names: Paths of the layers.
    """

    def __init__(
        self,
        state: GuidanceState,
        model: nn.Module,
        perturbation: NormalizedAttention,
        scale: float,
        names: tuple[str, ...],
    ) -> None:
        # Whatever is refused is refused before anything is put on the model.
        self._negative = negative_prompt_of(state.pipe(), perturbation)
        _refuse_longer(model, self._negative.length)
        check_hookable(model, names)
        super().__init__(state, model, perturbation, scale)
        self._names = names
        add_attention_hook(model, self, names)

    @property
    def hooked(self) -> tuple[str, ...]:
        """Paths of the layers at whose attention it acts."""
        return self._names

    def remove(self) -> None:
        """Takes the hooks off."""
        super().remove()
        model = self._model()
        if model is not None:
            remove_attention_hook(model, self)


class JointGuide(NormalizedGuide):
    """For joint attention: each call gets a second set of rows, with the negative text.

    The guided image tokens are written into both sets, so that only their texts differ. Where the
    texts differ in length, the shorter one is filled up, and no token attends to what fills it.
    """

    _started = 0.0

    def forget_run(self) -> None:
        """Begins a new run."""
        if self.scale > 0 and self.perturbation.strength > 0:
            _refuse_caches(self._model(), self._state.window == (0.0, 1.0))

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Doubles the batch and lets the attention layers be guided."""
        arguments, rows = self.arguments, len(self.latents)
        if any(arguments.get(name) is not None for name in STORES):
            raise ModelError(
                f"NormalizedAttention adds rows to the batch, and {type(model).__name__} is "
                "called with keys that are kept for its rows; use HeadPerturbation or SkipLayers"
            )
        own, present = self._negative.length, arguments["encoder_hidden_states"].shape[1]
        length = max(own, present)
        self._keys = None
        if own != present and not masks_of(arguments):
            lengths = torch.tensor([present] * rows + [own] * rows, device=self.latents.device)
            self._keys = torch.arange(length, device=lengths.device) < lengths[:, None]
        self._masks: dict[TokenLayout, Tensor] = {}
        arguments |= lengthened(arguments, length)
        negative = self._negative.replaced_in(arguments, rows, length)
        doubled = on_batch(arguments, rows, lambda t: torch.cat([t, t]))
        for name, tensor in negative.items():
            # One prompt for several images may come as one row, which models broadcast.
            doubled[name] = torch.cat([arguments[name].expand_as(tensor), tensor])
        self.is_active = True
        self._ran: set[str] = set()
        self._started = perf_counter()
        return (), doubled

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Drops the second set of rows."""
        self.is_active = False
        if output is None:
            return None
        prediction = prediction_of(output)
        on_cpu = prediction.device.type == "cpu"
        # Half of the call is what the pipeline asked for; caches leave out layers of both halves.
        share = len(self._ran) / len(self._names)
        self._state.count(share, (perf_counter() - self._started) / 2 if on_cpu else None)
        return with_prediction(output, prediction[: len(prediction) // 2])

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Guides the image tokens of an attention output (2 B, N, H, D)."""
        self._ran.add(call.layer.name)
        if call.is_cross_attention or call.is_text_part:
            return compute(call)
        layout = call.inputs().layout
        if self._keys is not None and layout.text_length:
            call = replace(call, mask=self._mask(layout))
        output = call.completed(compute(call))
        half, image = len(output) // 2, layout.visual_slice
        total = None if call.share is None else call.share.total
        sound, pushed = output[:half, image], output[half:, image]
        guided = self.perturbation.combined(sound, pushed, self.scale, total)
        output = output.clone()
        output[:half, image] = output[half:, image] = guided
        return call.asked(output)

    def _mask(self, layout: TokenLayout) -> Tensor:
        """Returns which tokens are attended to, (2 B, 1, 1, N); one tensor for each layout."""
        if layout not in self._masks:
            keys: Any = self._keys
            mask = keys.new_ones(len(keys), layout.length)
            kinds = [segment.kind for segment in layout.segments]
            text = sum(part.length for part in layout.segments[: kinds.index("text")])
            mask[:, text : text + keys.shape[1]] = keys
            self._masks[layout] = mask[:, None, None]
        return self._masks[layout]


class CrossGuide(NormalizedGuide):
    """For separate text cross-attention: only that is computed for both prompts."""

    wraps_processor = True

    _is_negative = False

    def why_not_compiled(self) -> str:
        """Returns why a compiled denoiser cannot be guided so."""
        return "its cross-attention runs for two prompts"

    def forget_run(self) -> None:
        """Begins a new run."""
        self._contexts: dict[int, dict[str, Tensor | None]] = {}

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds out what the negative text looks like to the cross-attention layers."""
        rows = len(self.latents)
        if rows not in self._contexts:
            self._contexts[rows] = self._read_context(model, rows)
        self._context = self._contexts[rows]
        self.is_active = True
        self._state.count(0.0, 0.0)

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Ends the guided call."""
        self.is_active = False

    def process(
        self, attached: AttachedLayer, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Runs a layer for both prompts, and guides its output."""
        owner: Any = type(attached.stock)
        signature = forward_signature(owner, "__call__")
        negative = signature.bind_partial(attached.stock, *args, **kwargs)
        hidden = negative.arguments["hidden_states"]
        for name, tensor in self._context.items():  # caches may leave out rows of a batch
            negative.arguments[name] = tensor if tensor is None else tensor[: len(hidden)]
        self._outputs: list[Tensor] = []
        self._is_negative = True
        try:
            run(*negative.args[1:], **negative.kwargs)
        finally:
            self._is_negative = False
        return run(*args, **kwargs)

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Keeps the output for the negative prompt, and guides the other one by it."""
        output = compute(call)
        if self._is_negative:
            self._outputs.append(output)
            return output
        return self.perturbation.combined(output, self._outputs[call.index], self.scale)

    def _read_context(self, model: nn.Module, rows: int) -> dict[str, Tensor | None]:
        """Runs the model with the negative text as far as its first cross-attention."""
        arguments, length = unconsumed(self.arguments), self._negative.length
        if self._binding.fills_text_up:
            length = max(length, arguments["encoder_hidden_states"].shape[1])
        arguments |= self._negative.replaced_in(arguments, rows, length)
        first = model.get_submodule(self._names[0])
        handle = first.register_forward_pre_hook(_stop_here, with_kwargs=True)
        try:
            with self.calling_again():
                model(**arguments)
        except _ReachedError as reached:
            return reached.context
        finally:
            handle.remove()
        raise RuntimeError(f"{type(model).__name__} never ran its cross-attention")


def normalized_guide(
    state: GuidanceState, model: nn.Module, perturbation: NormalizedAttention, scale: float
) -> Guide:
    """Makes the guide that suits how a denoiser attends to its text."""
    binding = binding_of(model)
    if binding.one_prompt:
        raise ModelError(
            f"NormalizedAttention cannot guide {type(model).__name__}: {binding.one_prompt}; use "
            "HeadPerturbation or SkipLayers"
        )
    layers = binding.layers(model)
    if any(layer.kind == "joint" for layer in layers):
        if (
            binding.cuts_text
            or "encoder_hidden_states" not in forward_signature(type(model)).parameters
        ):
            raise ModelError(
                "NormalizedAttention attends to two prompts in one attention call, which "
                f"{type(model).__name__} does not; use a perturbation"
            )
        if scale > 0 and perturbation.strength > 0:
            _refuse_caches(model, state.window == (0.0, 1.0))
        names = tuple(layer.name for layer in layers)
        return JointGuide(state, model, perturbation, scale, names)
    return CrossGuide(state, model, perturbation, scale, binding.text_layers(model))


def _refuse_longer(model: nn.Module, length: int) -> None:
    longest = binding_of(model).longest_text(model)
    if longest is not None and length > longest:
        raise ModelError(
            f"{type(model).__name__} takes {longest} text tokens at most, and the negative "
            f"prompt has {length}; shorten it"
        )


def _refuse_caches(model: nn.Module, whole: bool) -> None:
    """Raises ModelError where rows added to the batch would disturb a cache.

    Args:
        model: The denoiser.
        whole: Whether all steps are guided, so that the batch has one size.
    """
    caches = caches_of(model)
    if whole:
        caches &= READS_ROWS
    instead = "" if caches & READS_ROWS else " or guide all steps"
    refuse_caches(model, "NormalizedAttention adds rows to the batch", caches, instead)


class _ReachedError(Exception):
    """Carries what the first cross-attention layer was called with out of the model."""

    def __init__(self, context: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.context = context


def _stop_here(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    owner: Any = type(module)
    call = forward_signature(owner).bind_partial(module, *args, **kwargs).arguments
    names = ("encoder_hidden_states", "attention_mask")
    raise _ReachedError({name: call[name] for name in names if name in call})
