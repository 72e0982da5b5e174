"""Two paths through one denoiser: windows draw, full attention says where (FreeSwim).

Both paths start each step from the same latent, as rows of one batch. Self-attention is windowed
in the window rows and full in the full rows; cross-attention, which decides what is drawn where,
is computed from the full rows alone and given to both. Its outputs may serve several steps.

After "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
Ultra-High-Resolution Video Generation" (Wu, Song, Tan, He, Liu, 2025,
https://arxiv.org/abs/2511.14712).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffaccel.attach.attachment import (
    add_attention_hook,
    remove_attention_hook,
    set_attn_processor,
)
from diffaccel.attach.caches import caches_of, refuse_caches
from diffaccel.attach.call import AttentionCall, AttentionHook, Compute
from diffaccel.attach.report import Report
from diffaccel.bindings import UnsupportedModelError, binding_of
from diffaccel.methods.windows.base import WindowMethod
from diffaccel.pipelines.windows import throughout

Cache = Literal["keep", "offload", "int8"]
Mode = Literal["guide", "reuse", "alone"]
StoreKey = tuple[str, str, int]


class DualPath(AttentionHook):
    """Runs a denoiser with separate text cross-attention on two paths. A context manager.

    Inside the context windows are attached to the model; afterwards it is as before.

    Args:
        model: A denoiser whose blocks have self-attention `attn1` and cross-attention `attn2`
            (Wan).
        method: The windows of the window path.
        cache: Where cross-attention outputs wait for their reuse: "keep" (on the device, exact),
            "offload" (in main memory, exact), "int8" (on the device, rounded to 8 bits per row
            and head).

    Attributes:
        mode: What the current run does.
        prompt: Whose outputs it keeps or reuses.
        store: The kept cross-attention outputs.
    """

    def __init__(self, model: nn.Module, method: WindowMethod, cache: Cache = "keep") -> None:
        if cache not in get_args(Cache):
            raise ValueError(f"cache must be one of {', '.join(get_args(Cache))}, got {cache=}")
        self._model = model
        self._method = throughout(method)
        self.mode: Mode = "alone"
        self.prompt = ""
        self.store = CrossStore(cache)

    def __enter__(self) -> DualPath:
        cross = binding_of(self._model).text_layers(self._model)
        if not cross:
            raise UnsupportedModelError(
                "two paths need separate text cross-attention, which "
                f"{type(self._model).__name__} does not have; use a Wan pipeline"
            )
        why = "two paths change the batch"
        refuse_caches(self._model, why, caches_of(self._model))
        self._attachment = set_attn_processor(self._model, self._method, always=True)
        own = [layer.name for layer in self._attachment.report().layers]
        add_attention_hook(self._model, self, (*own, *cross))
        return self

    def __exit__(self, *exception: object) -> None:
        remove_attention_hook(self._model, self)
        self._attachment.remove()
        self.store.clear()

    def guided(self, prompt: str, **call: Any) -> Tensor:
        """Runs both paths and keeps the cross-attention outputs.

        Args:
            prompt: Under which name the outputs are kept.
            call: Arguments of the model for the window rows (B, ...).

        Returns:
            The prediction of the window path.
        """
        batch = len(call["hidden_states"])
        doubled = {
            name: torch.cat([value, value])
            if isinstance(value, Tensor) and len(value) == batch
            else value
            for name, value in call.items()
        }
        return self._run("guide", doubled, prompt)[:batch]

    def reused(self, prompt: str, **call: Any) -> Tensor:
        """Runs the window path alone with the outputs of the last guided run of a prompt."""
        return self._run("reuse", call, prompt)

    def alone(self, **call: Any) -> Tensor:
        """Runs the window path with its own cross-attention."""
        return self._run("alone", call)

    def report(self) -> Report:
        """Returns what the windows did."""
        return self._attachment.report()

    def attend(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Attends on both paths."""
        if call.layer.kind == "cross":
            return self._attend_text(call, compute)
        if self.mode == "reuse":
            return compute(call)
        half = len(call.query) // 2
        windows, full = call.rows(slice(half)), call.rows(slice(half, None))
        layout = call.inputs().layout
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        full = replace(full, scale=scale * self._method.temperature(layout))
        outputs = compute(windows), full.dense()
        method = call.attached.state.method
        if method is not None:
            method.record(call.layer, layout, "the full path sees everything")
        return torch.cat(outputs)

    def _attend_text(self, call: AttentionCall, compute: Compute) -> Tensor:
        """Computes cross-attention from the full rows, or takes it from the store."""
        # image to video attends the image first, then the text
        key = self.prompt, call.layer.name, call.index
        if self.mode == "reuse":
            return self.store.get(key, call.query)
        output = compute(call.rows(slice(len(call.query) // 2, None)))
        self.store.put(key, output)
        return torch.cat([output, output])

    def begin(self, mode: Mode, prompt: str = "") -> None:
        """Says what the next run of the model does; a guide forgets what was kept before."""
        if mode == "guide":
            self.store.clear(prompt)
        self.mode, self.prompt, self.is_active = mode, prompt, mode != "alone"

    def end(self) -> None:
        """Ends a run."""
        self.mode, self.is_active = "alone", False

    def _run(self, mode: Mode, call: dict[str, Any], prompt: str = "") -> Tensor:
        self.begin(mode, prompt)
        try:
            return self._model(**call, return_dict=False)[0]
        finally:
            self.end()


class CrossStore:
    """Cross-attention outputs (B, N, H, D) by prompt, layer and call within the layer.

    Args:
        cache: How they are kept, see `DualPath`.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._kept: dict[StoreKey, tuple[Tensor, Tensor | None]] = {}

    def clear(self, prompt: str | None = None) -> None:
        """Forgets a prompt or everything, so that memory is free before new outputs come."""
        gone = [key for key in self._kept if prompt is None or key[0] == prompt]
        for key in gone:
            del self._kept[key]

    def put(self, key: StoreKey, output: Tensor) -> None:
        """Keeps one output."""
        if self.cache == "int8":
            step = output.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
            self._kept[key] = (output / step).round().to(torch.int8), step
        else:
            self._kept[key] = output.cpu() if self.cache == "offload" else output, None

    def get(self, key: StoreKey, like: Tensor) -> Tensor:
        """Returns one output in the dtype and on the device of `like`."""
        kept, step = self._kept[key]
        return (kept if step is None else kept * step).to(like.device, like.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        parts = (part for pair in self._kept.values() for part in pair if part is not None)
        return sum(part.nbytes for part in parts)
