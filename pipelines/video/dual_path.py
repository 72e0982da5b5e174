"""Two paths through one denoiser: windows draw, full attention says where (FreeSwim).

Both paths start each step from the same latent, as rows of one batch. Self-attention is windowed
in the window rows and full in the full rows; cross-attention, which decides what is drawn where,
is computed from the full rows alone and given to both. Its outputs may serve several steps.

After "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
Ultra-High-Resolution Video Generation" (Wu, Song, Tan, He, Liu, 2025,
https://arxiv.org/abs/2511.14712).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffaccel.attach.attachment import set_attn_processor
from diffaccel.attach.processor import AttentionCall, linked, stock_of
from diffaccel.attach.report import Report
from diffaccel.bindings import AttentionLayer, UnsupportedModelError, processor_modules
from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods.base import Method
from diffaccel.methods.windows.base import WindowMethod

Cache = Literal["keep", "offload", "int8"]
Mode = Literal["guide", "reuse", "alone"]
StoreKey = tuple[str, str, int]


class DualPath:
    """Runs a denoiser with separate text cross-attention on two paths. A context manager.

    Inside the context the model's processors are replaced; afterwards they are the stock ones.

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
        self._method = method
        self.mode: Mode = "alone"
        self.prompt = ""
        self.store = CrossStore(cache)

    def __enter__(self) -> DualPath:
        cross = [name for name, _ in processor_modules(self._model) if name.endswith(".attn2")]
        if not cross:
            raise UnsupportedModelError(
                "two paths need separate text cross-attention, which "
                f"{type(self._model).__name__} does not have; use a Wan pipeline"
            )
        self._attachment = set_attn_processor(
            self._model, TwoPathAttn(self._method, self), always=True
        )
        for name in cross:
            module = self._model.get_submodule(name)
            module.set_processor(linked(module.processor, CrossLink(module.processor, name, self)))
        self._cross = cross
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self._cross:
            module = self._model.get_submodule(name)
            module.set_processor(stock_of(module.processor))
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
        self.store.clear(prompt)
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

    def _run(self, mode: Mode, call: dict[str, Any], prompt: str = "") -> Tensor:
        self.mode, self.prompt = mode, prompt
        try:
            return self._model(**call, return_dict=False)[0]
        finally:
            self.mode = "alone"


class CrossStore:
    """Cross-attention outputs (B, H, N, D) by prompt, layer and call within the layer.

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


@dataclass(frozen=True, slots=True)
class TwoPathAttn(Method):
    """Windows for the window rows, full attention for the full rows of a guided run.

    Args:
        window: What the window rows compute.
        paths: Whose mode says whether the second half of the batch is full rows.
    """

    window: WindowMethod
    paths: DualPath = field(repr=False, compare=False)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        scale: float | None,
        key_padding_mask: Tensor | None,
        layer: int | None,
    ) -> tuple[Tensor, Tensor | float]:
        batch = len(query)
        count = batch // 2 if self.paths.mode == "guide" else batch
        output = torch.empty_like(query)
        output[:count], density = self.window.attend_with_density(
            query[:count], key[:count], value[:count], layout, scale=scale, layer=layer
        )
        if count == batch:
            return output, density
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scale *= self.window.temperature(layout)
        output[count:] = dense_attention(query[count:], key[count:], value[count:], scale=scale)
        return output, (density + 1.0) / 2


@dataclass(slots=True)
class CrossLink:
    """What a cross-attention processor knows: the one it stands for, its layer, the paths."""

    stock: Any
    name: str
    paths: DualPath

    @property
    def layer(self) -> AttentionLayer:
        """The layer, for reports."""
        return AttentionLayer(self.name, "cross", 0)

    def serve(self, processor: Any, stock_class: type, args: tuple, kwargs: dict) -> Any:
        """Runs the stock processor with its attention shared between the paths."""
        with CrossSwap(self):
            return stock_class.__call__(processor, *args, **kwargs)


class CrossSwap(TorchFunctionMode):
    """While active, computes cross-attention from the full rows, or takes it from the store."""

    def __init__(self, link: CrossLink) -> None:
        super().__init__()
        self.link = link
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        paths = self.link.paths
        if func is not F.scaled_dot_product_attention or paths.mode == "alone":
            return func(*args, **kwargs)
        call = AttentionCall(*args, **kwargs)
        # image to video attends the image first, then the text
        key = paths.prompt, self.link.name, self.calls
        self.calls += 1
        if paths.mode == "reuse":
            return paths.store.get(key, call.query)
        half = len(call.query) // 2
        tokens = (x[half:] for x in (call.query, call.key, call.value))
        mask = None if call.attn_mask is None else call.attn_mask[-half:]
        output = func(*tokens, attn_mask=mask, scale=call.scale)
        paths.store.put(key, output)
        return torch.cat([output, output])
