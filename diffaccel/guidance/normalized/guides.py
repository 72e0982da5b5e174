"""Guidance away from a negative prompt inside of attention, on one denoiser."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffaccel.attach.processor import linked, stock_of
from diffaccel.bindings import AttentionLayer, processor_modules
from diffaccel.bindings.base import forward_signature
from diffaccel.guidance.guide import Guide, on_batch, perturbing, with_prediction
from diffaccel.guidance.normalized.negative_prompt import negative_prompt_of
from diffaccel.layout import TokenLayout


class JointGuide(Guide):
    """For joint attention: each call gets a second set of rows, with the negative text.

    The guided image tokens are written into both sets, so that only their texts differ.
    """

    def __init__(self, pipe: Any, model: nn.Module, *arguments: Any) -> None:
        super().__init__(pipe, model, *arguments)
        self._negative = negative_prompt_of(pipe, self.perturbation)
        self._changes = ExitStack()

    @property
    def touched(self) -> tuple[int, ...]:
        """Every layer is guided."""
        return tuple(range(len(self._layers)))

    def remove(self) -> None:
        """Takes the hooks off."""
        super().remove()
        self._changes.close()

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Doubles the batch and lets the attention layers be guided."""
        self._changes.close()
        arguments, rows = self.arguments, len(self.latents)
        negative = self._negative.replaced_in(arguments, rows)
        doubled = on_batch(arguments, rows, lambda t: torch.cat([t, t]))
        for name, tensor in negative.items():
            doubled[name] = torch.cat([arguments[name], tensor])
        run = self._changes.enter_context(perturbing(model, self))
        run.begin_call(model, (), doubled)  # a hook set just now comes too late for this call
        self.guided.add(self.step)
        self.extra_forwards += 1.0
        self._started = perf_counter()
        return (), doubled

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Drops the second set of rows."""
        self._changes.close()
        if output is None:
            return None
        prediction = output[0]
        on_cpu = prediction.device.type == "cpu"
        # Half of the call is what the pipeline asked for.
        self.seconds = self.seconds + (perf_counter() - self._started) / 2 if on_cpu else None
        return with_prediction(output, prediction[: len(prediction) // 2])

    def perturb(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        layer: int | None,
    ) -> Tensor:
        """Guides the image tokens of an attention output (2 B, N, H, D)."""
        half, image = len(output) // 2, layout.visual_slice
        guided = self.perturbation.combined(output[:half, image], output[half:, image], self.scale)
        output = output.clone()
        output[:half, image] = output[half:, image] = guided
        return output


class CrossGuide(Guide):
    """For separate text cross-attention: only that is computed for both prompts."""

    def __init__(self, pipe: Any, model: nn.Module, *arguments: Any) -> None:
        super().__init__(pipe, model, *arguments)
        self._negative = negative_prompt_of(pipe, self.perturbation)
        self.context: dict[str, Tensor | None] | None = None
        self._cross = [name for name, _ in processor_modules(model) if name.endswith(".attn2")]
        for name in self._cross:
            module = model.get_submodule(name)
            module.set_processor(linked(module.processor, CrossLink(module.processor, name, self)))

    def remove(self) -> None:
        """Takes the hooks off and puts the stock processors back."""
        super().remove()
        model = self._model()
        for name in self._cross if model is not None else ():
            module = model.get_submodule(name)
            link = getattr(module.processor, "_diffaccel_link", None)
            if isinstance(link, CrossLink):
                module.set_processor(stock_of(module.processor))
        self._cross = []

    def forget_run(self) -> None:
        """Begins a new run."""
        super().forget_run()
        self._contexts: dict[int, dict[str, Tensor | None]] = {}

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds out what the negative text looks like to the cross-attention layers."""
        rows = len(self.latents)
        if rows not in self._contexts:
            self._contexts[rows] = self._read_context(model, rows)
        self.context = self._contexts[rows]
        self.guided.add(self.step)

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Ends the guided call."""
        self.context = None

    def _read_context(self, model: nn.Module, rows: int) -> dict[str, Tensor | None]:
        """Runs the model with the negative text as far as its first cross-attention."""
        arguments = self.arguments
        arguments.update(self._negative.replaced_in(arguments, rows))
        first = model.get_submodule(self._cross[0])
        handle = first.register_forward_pre_hook(_stop_here, with_kwargs=True)
        try:
            with self.calling_again():
                model(**arguments)
        except _ReachedError as reached:
            return reached.context
        finally:
            handle.remove()
        raise RuntimeError(f"{type(model).__name__} never ran its cross-attention")


@dataclass(slots=True)
class CrossLink:
    """What a guided cross-attention processor knows: its stock, its layer, the guide."""

    stock: Any
    name: str
    guide: CrossGuide

    @property
    def layer(self) -> AttentionLayer:
        """The layer, for reports."""
        return AttentionLayer(self.name, "cross", 0)

    def serve(self, processor: Any, stock_class: type, args: tuple, kwargs: dict) -> Any:
        """Runs the stock processor for both prompts, and guides its output."""
        guide = self.guide
        if guide.context is None:
            return self.stock(*args, **kwargs)
        call = forward_signature(stock_class, "__call__").bind_partial(processor, *args, **kwargs)
        negative_call = {**call.arguments, **guide.context}
        negative_call.pop("self", None)
        with AttentionOutputs() as negative:
            stock_class.__call__(processor, **negative_call)
        with GuidedOutputs(guide, negative.outputs):
            return stock_class.__call__(processor, *args, **kwargs)


class AttentionOutputs(TorchFunctionMode):
    """While active, keeps what every SDPA call returns."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.outputs.append(output)
        return output


class GuidedOutputs(TorchFunctionMode):
    """While active, guides what every SDPA call returns by what it returned for the other text."""

    def __init__(self, guide: CrossGuide, negative: list[Tensor]) -> None:
        super().__init__()
        self.guide = guide
        self.negative = iter(negative)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return output
        guided = self.guide.perturbation.combined(
            output.transpose(1, 2), next(self.negative).transpose(1, 2), self.guide.scale
        )
        return guided.transpose(1, 2)


class _ReachedError(Exception):
    """Carries what the first cross-attention layer was called with out of the model."""

    def __init__(self, context: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.context = context


def _stop_here(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    call = forward_signature(type(module)).bind_partial(module, *args, **kwargs).arguments
    names = ("encoder_hidden_states", "attention_mask")
    raise _ReachedError({name: call[name] for name in names if name in call})
