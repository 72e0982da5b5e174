"""What a binding is: how the attention of one model family reaches a method."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.bindings.axes import Axis
from diffaccel.errors import ModelError
from diffaccel.layout import Grid, Segment, TokenLayout


class UnsupportedModelError(ModelError, NotImplementedError):
    """A model or pipeline whose attention no binding knows."""


class LayoutUnknown(ValueError):
    """A model call that does not tell its token layout; its attention then runs dense."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention module that a method may serve.

    Args:
        name: Path of the module inside the denoiser.
        kind: "joint" (visual and text tokens in one sequence), "self" (visual tokens only) or
            "cross" (visual queries, text keys), which no method serves.
        index: Position among the layers of its denoiser that a method serves.
        level: Resolution level, for U-Nets: 0 is the input resolution, each further one halves it.
        nesting: Modules from the layer up to its block.
    """

    name: str
    kind: str
    index: int
    level: int = 0
    nesting: int = 1

    @property
    def block(self) -> str:
        """Path of the block that the layer belongs to."""
        return ".".join(self.name.split(".")[: -self.nesting])

    @property
    def stream(self) -> tuple[str, int]:
        """What decides about the layer's token layout within one model call."""
        return self.kind, self.level


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of a denoiser, as its forward pre-hook sees it.

    Args:
        arguments: Every argument of the call by name.
        readings: What was read from tensor values so far, kept from call to call.
    """

    arguments: dict[str, Any]
    readings: dict[int, tuple[Tensor, Any]]

    @classmethod
    def of(
        cls,
        model: Any,
        args: tuple,
        kwargs: dict[str, Any],
        readings: dict[int, tuple[Tensor, Any]],
    ) -> ModelCall:
        """Gives the positional arguments of a call their names."""
        bound = forward_signature(type(model)).bind_partial(model, *args, **kwargs)
        return cls(bound.arguments, readings)

    def __getitem__(self, name: str) -> Any:
        """Returns one argument; raises LayoutUnknown where the call lacks it."""
        value = self.arguments.get(name)
        if value is None:
            raise LayoutUnknown(f"the model was called without {name}")
        return value

    def read(self, tensor: Tensor, reader: Callable[[Tensor], Any]) -> Any:
        """Returns reader(tensor), computed once for each tensor object.

        Reading values waits for the device; pipelines pass the same tensor at every step.
        """
        known = self.readings.get(id(tensor))
        if known is None or known[0] is not tensor:
            if len(self.readings) >= 8:
                self.readings.clear()
            # Keeping the tensor keeps its id from being given to another one.
            known = self.readings[id(tensor)] = (tensor, reader(tensor))
        return known[1]


def forward_signature(owner: Any, name: str = "forward") -> inspect.Signature:
    """The signature of a class's method, `self` included."""
    return _signature(owner, name)


@functools.cache
def _signature(owner: Any, name: str) -> inspect.Signature:
    return inspect.signature(getattr(owner, name))


class Binding:
    """How the attention of one model family reaches a method. Stateless.

    A subclass says all that this library knows about a family: which layers a method may serve
    (`patterns`), what the tokens of a model call are (`layout`), whose published settings apply
    (`family`), and how the denoiser is called and built where that matters.
    """

    patterns: tuple[tuple[str, str], ...] = ()
    """(regular expression over the module path, kind of `AttentionLayer`); the first full match
    counts."""

    stacks: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    """Attributes of the denoiser that hold its blocks, in the order of layers. The order in which
    modules are registered does not last: cache-dit takes stacks out and puts them back."""

    block_outputs: tuple[str, ...] = ("hidden_states",)
    """Names of the arguments of a block that it returns changed, in the order of its outputs."""

    blocks_of_images: bool = False
    """Whether blocks get images (B, C, H, W), not tokens (B, N, C)."""

    returns_none: bool = False
    """Whether blocks return None for what they do not get (Kandinsky 6 without sound)."""

    is_chain: bool = True
    """Whether each of the `stages` hands its outputs to the next alone, without connections that
    skip stages."""

    batches_prompts: bool = False
    """Whether pipelines ask for the empty and the given prompt in one batch, in this order.
    Otherwise they call the model twice, first with the given prompt."""

    latents: str = "hidden_states"
    """Name of the argument that is denoised."""

    unguided: str = ""
    """Why no guidance can serve the family, "" where it can."""

    one_prompt: str = ""
    """Why a call cannot get another prompt, as `NormalizedAttention` needs, "" where it can."""

    text_length: int = 0
    """Tokens to which pipelines pad a prompt that is cross-attended; 0 where text is joint."""

    fills_text_up: bool = False
    """Whether pipelines fill a prompt up with zeros that are attended to like its tokens."""

    attends_text_apart: bool = False
    """Whether text or reference images attend to themselves in a call of their own, beside that
    in which visual queries see all."""

    mixes_text: str = ""
    """Regular expression over paths of layers whose blocks get text and visual tokens in one
    tensor."""

    writes_masks_out: bool = False
    """Whether layers write a key-padding mask (B, N) out for every pair of tokens."""

    cuts_text: bool = False
    """Whether each sample is attended in a call of its own, without its masked text, which comes
    last in the sequence."""

    family_choices: tuple[str, ...] = ()
    """Names among which `family` chooses by the model, in the class that defines it; () where it
    looks at no model."""

    scales_rope: bool = False
    """Whether `scaled_rope` is defined."""

    @property
    def text_kind(self) -> str:
        """How text comes in: "joint", "cross", or "" where there is none."""
        kinds = {kind for _, kind in self.patterns}
        return next((kind for kind in ("joint", "cross") if kind in kinds), "")

    def family(self, model: Any, pipe: Any) -> str:
        """Returns the model family's name in `diffaccel.methods.published`.

        Args:
            model: The denoiser.
            pipe: The pipeline that it belongs to, or None where only the model is known.
        """
        return "other"

    def families(self) -> tuple[str, ...]:
        """Returns the names that `family` may return."""
        owner = next(kind for kind in type(self).__mro__ if "family" in vars(kind))
        return vars(owner).get("family_choices") or (self.family(None, None),)

    def layout(self, model: Any, call: ModelCall, layer: AttentionLayer) -> TokenLayout:
        """Returns what the tokens of one layer are; raises LayoutUnknown if the call hides it.

        Reads shapes and plain numbers; tensor values only through `call.read`.
        """
        raise NotImplementedError

    def example_call(
        self, model: Any, latents: tuple[int, ...], text: int, batch: int = 1
    ) -> dict[str, Any]:
        """Returns the arguments of one whole call of a denoiser, zeros where values do not count.

        On the meta device such a call computes nothing, and tells every shape.

        Args:
            model: The denoiser; tensors are of its dtype and on its device.
            latents: Size (h, w) of the latents in elements, of a video (f, h, w).
            text: Text tokens, joint or cross-attended.
            batch: B.
        """
        raise NotImplementedError

    def timestep(self, call: ModelCall) -> Tensor | float | None:
        """Returns the timestep of a call, largest for pure noise; None where it has none."""
        return call.arguments.get("timestep")

    def written_mask(self, call: ModelCall) -> Tensor | None:
        """Returns what becomes the mask of visual rows, where blocks write it out for all pairs.

        (B, N), bool or added to the scores; None where the masks of attention calls are looked at.
        """
        return None

    def predicts(self, call: ModelCall) -> bool:
        """Whether a call predicts; others keep keys of images or frames for later calls."""
        return True

    def longest_text(self, model: Any) -> int | None:
        """Returns how many text tokens a denoiser takes at most, None where any number."""
        return None

    def native(self, model: Any, layer: AttentionLayer) -> Grid | None:
        """Returns (frames, height, width) in tokens of what the model was trained on, if known."""
        return None

    def scaled_rope(
        self, model: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
    ) -> AbstractContextManager[None]:
        """Returns a context in which rotary positions are scaled, where `scales_rope`.

        Args:
            model: The denoiser.
            axes: What happens to frames, rows and columns; None for nothing.
        """
        raise NotImplementedError

    def level(self, model: Any, name: str) -> int:
        """Returns the resolution level of a layer, 0 for models of one resolution."""
        return 0

    def layers(self, model: Any) -> tuple[AttentionLayer, ...]:
        """Returns the layers of self-attention over visual tokens, in the model's order."""
        found: list[AttentionLayer] = []
        for name in sorted((name for name, _ in processor_modules(model)), key=self._stack):
            kind = self._kind(name)
            if kind in ("joint", "self"):
                found.append(AttentionLayer(name, kind, len(found), self.level(model, name)))
        return tuple(found)

    def text_layers(self, model: Any) -> tuple[str, ...]:
        """Returns the paths of the layers of separate cross-attention to the text."""
        return tuple(name for name, _ in processor_modules(model) if self._kind(name) == "cross")

    def stages(self, model: Any) -> tuple[str, ...]:
        """Returns the paths of the parts that a call runs through one after the other."""
        return tuple(dict.fromkeys(layer.block for layer in self.layers(model)))

    def skipped(self, model: Any) -> dict[str, str]:
        """Returns the other attention layers of the model, with the reason to leave them alone."""
        return {
            name: self.skip_reason(name)
            for name, _ in processor_modules(model)
            if self._kind(name) not in ("joint", "self")
        }

    def skip_reason(self, name: str) -> str:
        """Returns why a method does not serve a layer."""
        is_cross = self._kind(name) == "cross"
        return "cross-attention" if is_cross else "not attention over visual tokens"

    def _stack(self, name: str) -> int:
        """Returns the place of a layer's stack; sorting is stable, so layers keep theirs in it."""
        stack = name.partition(".")[0]
        return self.stacks.index(stack) if stack in self.stacks else len(self.stacks)

    def _kind(self, name: str) -> str:
        for pattern, kind in self.patterns:
            if re.fullmatch(pattern, name):
                return kind
        return ""


TEMPORAL = "attention along time, over few frames at one place"
"""Why layers stay as they are that join the frames of one place alone."""


def processor_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the path and the module of every attention layer that has a processor."""
    for name, module in model.named_modules():
        if callable(getattr(module, "processor", None)):
            yield name, module


def set_processor(module: Any, processor: Any) -> None:
    """Gives an attention layer a processor; Mochi's have no method for it."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def told_native(model: Any) -> Grid | None:
    """Returns the native grid that a denoiser's own configuration tells, if it does.

    The key `_native_grid` holds (frames, height, width) in tokens. diffusers keeps keys that begin
    with an underscore, and passes them over when it builds a model.
    """
    told = model.config.get("_native_grid")
    return None if told is None else tuple(told)


def zeros(model: Any, *shape: int) -> Tensor:
    """Returns zeros in the dtype and on the device of a denoiser."""
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


def reversed_time(time: Any) -> Any:
    """Returns the timestep where a model's time runs from noise, 0, to the image, 1."""
    return None if time is None else 1 - time


def patched(size: int, patch: int) -> int:
    """Returns how many tokens lie along an axis of `size` latent elements."""
    if size < patch:
        raise LayoutUnknown(f"the latent has {size} elements on an axis of patches of {patch}")
    return size // patch


def image_grid(latents: Tensor, patch: int) -> Grid:
    """Returns the grid of tokens of one image of latents (B, C, h, w)."""
    height, width = (patched(side, patch) for side in latents.shape[-2:])
    return 1, height, width


def target_and_references(images: list[tuple[int, int, int]]) -> tuple[Segment, ...]:
    """Describes the image to denoise and the reference images that follow it."""
    target, *references = ((*grid,) for grid in images)
    return (
        Segment("visual", prod(target), target),
        *(Segment("condition", prod(grid), grid) for grid in references),
    )
