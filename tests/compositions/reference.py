"""A slow reference: a stock pipeline whose attention and guidance are done by hand.

Nothing of `diffaccel.attach`, `diffaccel.bindings` and `diffaccel.guidance` takes part: attention
is caught below the stock processors, layouts and layer names are those of `families.py`, steps are
counted at the scheduler, and damaged predictions come from a second stock model.
"""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffaccel import FullAttn, HeadPerturbation, NormalizedAttention, PermuteTokens
from tests.compositions import stock
from tests.compositions.draw import Composition
from tests.compositions.families import FAMILIES, layout_of


class Clock:
    """Counts the steps of a scheduler at the scheduler itself."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.index = 0
        step = scheduler.step

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.index += 1
            return result

        scheduler.step = counted

    def steps(self) -> list[int]:
        """The step of each entry of the list of timesteps."""
        times = self.scheduler.timesteps.tolist()
        if type(self.scheduler).__name__ != "PNDMScheduler":
            return [place // self.scheduler.order for place in range(len(times))]
        prepared = self.scheduler.prk_timesteps
        runge_kutta = 0 if prepared is None else len(prepared)
        rest = times[runge_kutta:]
        ranks = [sorted(set(rest), reverse=True).index(time) for time in rest]
        return [place // 4 for place in range(runge_kutta)] + [
            runge_kutta // 4 + rank for rank in ranks
        ]

    @property
    def step(self) -> int:
        """The current step."""
        return self.steps()[self.index]

    @property
    def progress(self) -> float:
        """Share of the list that lies behind."""
        return self.index / len(self.scheduler.timesteps)

    @property
    def share(self) -> float:
        """Share of the steps that lies behind."""
        return self.step / (self.steps()[-1] + 1)


class Reference:
    """Runs a composition by hand.

    Args:
        drawn: What is run.
        served: For each denoiser, the layers whose attention is the method's; None for all.
        exact: Whether attention that is dense is computed in fp64, to see what rounding does.

    Attributes:
        seen_steps: The steps in which each denoiser was called.
    """

    def __init__(
        self,
        drawn: Composition,
        served: dict[str, set[str]] | None = None,
        exact: bool = False,
    ) -> None:
        self.drawn = drawn
        self.facts = FAMILIES[drawn.family]
        self.exact = exact
        self.served = served
        self.method = drawn.method
        self.guidance = drawn.guidance
        if self.guidance and isinstance(self.guidance.perturbation, NormalizedAttention):
            self.guidance = None  # drawn so that it changes nothing
        self.tiny = stock.pipeline(drawn)
        stock.add_adapter(drawn, self.tiny)
        stock.add_cache(drawn, self.tiny)
        self.twins: dict[str, Any] = {}
        if self.guidance:
            twin = stock.pipeline(drawn)
            stock.add_adapter(drawn, twin)
            self.twins = twin.denoisers()
        self.clock = Clock(self.tiny.pipe.scheduler)
        self.seen_steps: dict[str, set[int]] = {}
        self._first: dict[str, int] = {}
        self._current: Any = None
        self._is_damaged = False
        self._delta: dict[str, tuple[int, Tensor]] = {}
        for name, model in self.tiny.denoisers().items():
            self._watch(name, model)
            model.register_forward_pre_hook(functools.partial(self._enter, name), with_kwargs=True)
            model.register_forward_hook(functools.partial(self._leave, name), with_kwargs=True)
        for name, model in self.twins.items():
            self._watch(name, model)

    def run(self) -> Tensor:
        """Returns the latents."""
        with _Caught(self):
            return stock.run(self.drawn, self.tiny)

    def _watch(self, denoiser: str, model: Any) -> None:
        for index, (layer, _) in enumerate(self.facts.layers):
            module = model.get_submodule(layer)

            def enter(*_: Any, index: int = index) -> None:
                self._current = (denoiser, index)

            def leave(*_: Any) -> None:
                self._current = None

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)

    # Steps and guidance

    def _enter(self, name: str, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        step = self.clock.step
        self._calls = 0 if (name, self.clock.index) != getattr(self, "_at", None) else 1
        self._at = (name, self.clock.index)
        self._first.setdefault(name, step)
        self.seen_steps.setdefault(name, set()).add(step)
        # Models take some of their arguments apart.
        self._arguments = (
            args,
            {
                key: dict(value) if isinstance(value, dict) else value
                for key, value in kwargs.items()
            },
        )

    def _leave(
        self, name: str, model: Any, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        guidance = self.guidance
        if guidance is None or not guidance.start <= self.clock.share < guidance.stop:
            return None
        prediction = output[0]
        rows = slice(None)
        if self.drawn.has_cfg and not self.facts.calls_apart:
            rows = slice(len(prediction) // 2, None)
        known = self._delta.get(name)
        if known is None or known[0] != self.clock.index:
            args, kwargs = self._arguments
            self._is_damaged = True
            try:
                with self._damaged_blocks(self.twins[name]):
                    damaged = self.twins[name](*args, **kwargs)[0]
            finally:
                self._is_damaged = False
            delta = guidance.scale * (prediction[rows] - damaged[rows])
            known = self._delta[name] = (self.clock.index, delta)
        delta = torch.cat([known[1]] * (len(prediction) // len(known[1])))
        if isinstance(output, tuple):
            return (prediction + delta, *output[1:])
        output.sample = prediction + delta
        return output

    @contextmanager
    def _damaged_blocks(self, model: Any) -> Any:
        perturbation = self.guidance.perturbation
        handles = []
        if not isinstance(perturbation, HeadPerturbation):
            blocks: dict[str, int] = {}
            for index in perturbation.layers:
                blocks.setdefault(self.facts.layers[index][0].rpartition(".")[0], index)
            for name, index in blocks.items():
                block = model.get_submodule(name)
                if isinstance(perturbation, PermuteTokens):
                    seed = hash((perturbation.seed, self.clock.step, index)) & 0x7FFF_FFFF
                    hook = functools.partial(_permuted, seed)
                    handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    hook = functools.partial(_skipped, self.facts.encoder_first)
                    handles.append(block.register_forward_hook(hook, with_kwargs=True))
        yield
        for handle in handles:
            handle.remove()

    # Attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Answers SDPA, (B, H, N, D), in the current layer."""
        denoiser, index = self._current
        tokens = [x.transpose(1, 2) for x in (query, key, value)]
        drawn = self.drawn
        text = drawn.negative_text if self._calls and self.facts.calls_apart else drawn.text
        layout = layout_of(drawn.family, index, drawn.rows, drawn.columns, drawn.frames, text)
        if layout.length != query.shape[2]:
            raise AssertionError(f"{layout} for {query.shape[2]} tokens in layer {index}")
        mask = _padding(options.get("attn_mask"), query.shape[0])
        step = self.clock.step - self._first[denoiser]
        if self._is_sparse(denoiser, index, step, layout):
            with torch.autocast("cpu", enabled=False):
                output = self.method.attend(
                    *tokens, layout, scale=options.get("scale"), key_padding_mask=mask,
                    layer=index, step=step, progress=self.clock.progress,
                )  # fmt: skip
        elif self.exact:
            weights = _weights(tokens[0], tokens[1], options.get("scale"), mask)
            output = _applied(weights, tokens[2]).to(value.dtype)
        else:
            output = F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
        perturbation = self.guidance and self.guidance.perturbation
        if self._is_damaged and isinstance(perturbation, HeadPerturbation):
            output = _damaged(
                perturbation, index, tokens, layout, options.get("scale"), mask, output
            )
        return output.transpose(1, 2)

    def _is_sparse(self, denoiser: str, index: int, step: int, layout: Any) -> bool:
        method = self.method
        if self.exact or method is None or method == FullAttn():
            return False
        if self.served is not None and self.facts.layers[index][0] not in self.served[denoiser]:
            return False
        if hasattr(method, "method"):  # what it wraps has a schedule, and what it adds has none
            return True
        if step < method.dense_steps and not self._has_ended():
            return False
        dense = method.dense_layers
        is_dense = index < dense if isinstance(dense, int) else index in dense
        if is_dense and not self._has_ended():
            return False
        return not method.shape_reason(layout)

    def _has_ended(self) -> bool:
        """Whether what follows agents decides; it has a schedule of its own."""
        return getattr(self.method, "stop", 1.0) <= self.clock.progress


class _Caught(TorchFunctionMode):
    """Catches SDPA in attended layers, where the keys are those of the queries' own sequence."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self._reference = reference

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self._reference._current is None:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, value = (named.pop(name) for name in ("query", "key", "value"))
        if query.shape[2] != key.shape[2]:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
            query, key, value = (x.bfloat16() for x in (query, key, value))
            mask = named.get("attn_mask")
            if mask is not None and mask.is_floating_point():
                named["attn_mask"] = mask.bfloat16()
        return self._reference.attend(query, key, value, named)


def _padding(mask: Tensor | None, batch: int) -> Tensor | None:
    if mask is None:
        return None
    valid = mask if mask.dtype == torch.bool else mask == 0
    return valid.reshape(-1, valid.shape[-1]).expand(batch, -1)


def _weights(query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query.double(), key.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return scores.softmax(-1)


def _applied(weights: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhnm,bmhd->bnhd", weights, value.double())


def _damaged(
    perturbation: HeadPerturbation, index: int, tokens: list[Tensor], layout: Any,
    scale: float | None, mask: Tensor | None, output: Tensor,
) -> Tensor:  # fmt: skip
    """Mixes damaged maps into the chosen heads of an output (B, N, H, D)."""
    query, key, value = tokens
    heads = range(query.shape[2])
    if index not in perturbation.layers:
        heads = [head for layer, head in perturbation.heads if layer == index]
    if not len(heads):
        return output
    count, image = query.shape[1], layout.visual_slice
    identity = torch.eye(count, dtype=torch.float64)
    is_image = torch.zeros(count, dtype=torch.bool)
    is_image[image] = True
    rows = torch.ones(count, dtype=torch.bool)
    weights = _weights(query, key, scale, mask)
    if perturbation.target == "uniform":
        valid = torch.ones(len(query), count, dtype=torch.bool) if mask is None else mask
        damaged = (valid.double() / valid.sum(1, keepdim=True))[:, None, None].expand(
            weights.shape
        )
    elif perturbation.target == "blur":
        rows = is_image
        blurred = query.double().clone()
        blurred[:, image] = _blurred(blurred[:, image], layout.grid, perturbation.sigma)
        damaged = _weights(blurred, key, scale, mask)
    elif perturbation.scope == "sequence":
        damaged = identity.expand(weights.shape)
    elif perturbation.scope == "image_mass":
        rows = is_image
        mass = (weights * is_image).sum(-1, keepdim=True)
        damaged = weights * ~is_image + mass * identity
    else:
        rows = is_image
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = torch.einsum("bnhd,bmhd->bhnm", query.double(), key.double()) * factor
        hidden = is_image[None] & ~identity.bool()
        if mask is not None:
            hidden = hidden | (~mask[:, None, None] & ~identity.bool())
        damaged = scores.masked_fill(hidden, -math.inf).softmax(-1)
    bad, mixed = _applied(damaged, value), output.double().clone()
    strength = perturbation.strength
    for head in heads:
        sound = mixed[:, rows, head]
        mixed[:, rows, head] = (1 - strength) * sound + strength * bad[:, rows, head]
    return mixed.to(output.dtype)


def _blurred(query: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Blurs (B, N, H, D) over rows and columns of each frame; over all tokens without an end."""
    if sigma == math.inf:
        return query.mean(1, keepdim=True).expand(query.shape)
    from diffaccel.kernels.reference.perturbed import blurred_grid

    return blurred_grid(query, grid, sigma)


def _permuted(seed: int, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    order = torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(seed))
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": hidden[:, order]}
    return (hidden[:, order], *args[1:]), kwargs


def _skipped(
    encoder_first: bool | None, block: Any, args: tuple, kwargs: dict[str, Any], output: Any
) -> Any:
    names = ("hidden_states", "encoder_hidden_states")
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden, encoder = given["hidden_states"], given.get("encoder_hidden_states")
    if encoder_first is None or not isinstance(output, tuple):
        return hidden
    return (encoder, hidden) if encoder_first else (hidden, encoder)
