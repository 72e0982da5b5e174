"""A tiny denoiser, one call of it, and what its attention should be: written down, not derived."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from diffaccel.layout import Grid, TokenLayout

Attend = Callable[..., Tensor]
WINDOW = (1, 3, 3)
"""Frames, rows and columns of the windows of the tests."""


@dataclass
class TinyModel:
    """A denoiser with random weights, one whole call of it, and the truth about its attention.

    Args:
        model: The denoiser, at least two layers where it allows.
        arguments: Arguments of one call: batch 2, not square, odd frames, texts of two lengths
            behind a mask where the model takes one.
        layouts: Regular expression over paths of layers that a method serves -> their tokens.
        grid: (frames, height, width) of the tokens to denoise, at least 4 high and so wide that
            some tokens lie further apart than all layers together reach by `WINDOW`.
        latents: Name of the argument that is denoised.
        axes: Its axes by letter: b, c, f, h, w, i for images of which the last one is denoised,
            or n for packed tokens; axes that are missing have one token. A list of samples, or of
            lists of images of which the last one is denoised, has axes without b; in a list of
            videos that have it, the last is the one to denoise.
        predicted: The axes of the prediction, where they are others.
        per_token: Names of other arguments that differ from token to token.
        start: Number of packed tokens before those to denoise.
        predicted_start: The same in the prediction, where it is another number.
        others: Regular expression over paths of layers over visual tokens that no method serves
            -> their tokens.
        batch: Samples of the call; models that take one at a time have no other.
        skipped: Number of attention layers that no method serves.
        cuts_text: Whether each sample is attended apart, without its masked text at the end.
        is_local: Whether nothing but attention mixes tokens; not so in U-Nets.
        origin: Index of the token whose rotary position is zero along each axis.
        wave_error: By how much the rotary waves of the stock model are off: fp32 rounds the
            angles of fast frequencies.
        latent_size: Size of the latents in elements, (h, w) or (f, h, w), as
            `Binding.example_call` takes it.
        text: Text tokens of that example call.
    """

    model: nn.Module
    arguments: dict[str, Any]
    layouts: dict[str, TokenLayout]
    grid: Grid
    latents: str = "hidden_states"
    axes: str = "bnc"
    predicted: str = ""
    per_token: tuple[str, ...] = ()
    start: int = 0
    predicted_start: int | None = None
    others: dict[str, TokenLayout] = field(default_factory=dict)
    batch: int = 2
    skipped: int = 0
    cuts_text: bool = False
    is_local: bool = True
    origin: Grid = (0, 0, 0)
    wave_error: float = 1e-5
    latent_size: tuple[int, ...] = ()
    text: int = 0

    @torch.no_grad()
    def predict(self, arguments: dict[str, Any] | None = None) -> Tensor:
        """Calls the model and returns its prediction, samples of a list stacked."""
        given = self.arguments if arguments is None else arguments
        options = {} if isinstance(self.model, diffusers.UVit2DModel) else {"return_dict": False}
        output = self.model(**given, **options)
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, list):
            return output[-1] if "b" in self.axes else torch.stack(list(output))
        return output

    def layer_names(self) -> set[str]:
        """Returns the paths of the layers that a method should serve."""
        return {name for name in self._modules() if self._layout(name, self.layouts)}

    def changed(self, place: Grid) -> dict[str, Any]:
        """Returns the arguments, one visual token of the first sample changed."""
        given = self.arguments[self.latents]
        if isinstance(given, list):
            if "b" in self.axes:
                latents: Any = [*given[:-1], given[-1].clone()]
                view = tokens(latents[-1], self.axes, self.grid, self.start)
            else:
                images = given[0] if isinstance(given[0], list) else given[:1]
                first = images[-1].clone()
                view = tokens(first[None], "b" + self.axes, self.grid, self.start)
                is_nested = images is given[0]
                latents = [[*images[:-1], first] if is_nested else first, *given[1:]]
        else:
            latents = given.clone()
            view = tokens(latents, self.axes, self.grid, self.start)
        view[0][place] += 1
        return {**self.arguments, self.latents: latents}

    def uniform(self) -> dict[str, Any]:
        """Returns the arguments, all visual tokens with the same content."""
        alike = {name: torch.zeros_like(self.arguments[name]) for name in self.per_token}
        return {**self.arguments, **alike, self.latents: ones_like(self.arguments[self.latents])}

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Returns by how much each token of the first sample moved, (frames, height, width)."""
        axes = self.predicted or self.axes
        axes = axes if "b" in axes else "b" + axes
        start = self.start if self.predicted_start is None else self.predicted_start
        start = start if "n" in axes else 0
        return tokens(after - before, axes, self.grid, start)[0].abs().flatten(3).amax(-1)

    @contextmanager
    def windowed(self, *, blind_text: bool = False) -> Iterator[None]:
        """Within it, visual tokens see only their window of visual tokens, and all others.

        Args:
            blind_text: Whether text and condition tokens see no visual ones, and layers that no
                method serves have windows too, so that nothing moves further than the windows do.
        """
        windows = self.layouts | (self.others if blind_text else {})

        def masked(
            plain: Attend, query: Tensor, *others: Tensor, mask: Tensor | None, layout: TokenLayout
        ) -> Tensor:
            window = window_mask(layout, blind_text)
            if query.shape[-2] != layout.length:
                window = window[asking(layout, query.shape[-2])]
            return plain(query, *others, attn_mask=both(window, mask))

        with self.attending(masked, windows):
            yield

    @contextmanager
    def attending(
        self, change: Attend, layouts: dict[str, TokenLayout] | None = None
    ) -> Iterator[None]:
        """Within it, SDPA of some layers answers what a function does in its place.

        Args:
            change: Called with SDPA as it was, query, key, value, and by name with the mask and
                the layout.
            layouts: Regular expression over paths of layers -> their tokens; None for those of
                the layers that a method serves.
        """
        running: list[str] = []
        known = self.layouts if layouts is None else layouts
        plain, plain_flex = F.scaled_dot_product_attention, flex_attention.flex_attention

        def changed(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Any = None,
            *args: Any,
            **options: Any,
        ) -> Tensor:
            layout = self._layout(running[-1], known) if running else None
            if layout is not None and self.cuts_text:
                layout = layout.cut(key.shape[-2])
            if layout is None or key.shape[-2] != layout.length:
                return plain(query, key, value, attn_mask, *args, **options)
            assert not any(args) and not options.get("is_causal")
            stock = partial(plain, **options)
            return change(stock, query, key, value, mask=attn_mask, layout=layout)

        handles = []
        for name, module in self._modules().items():
            enter, leave = partial(_enter, running, name), partial(_leave, running)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        F.scaled_dot_product_attention = changed
        flex_attention.flex_attention = _without_blocks
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain
            flex_attention.flex_attention = plain_flex
            for handle in handles:
                handle.remove()

    def _modules(self) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in self.model.named_modules()
            if callable(getattr(module, "processor", None))
        }

    @staticmethod
    def _layout(name: str, layouts: dict[str, TokenLayout]) -> TokenLayout | None:
        for pattern, layout in layouts.items():
            if re.fullmatch(pattern, name):
                return layout
        return None


def _without_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: None, scale: Any, **_: Any
) -> Tensor:
    """FlexAttention without a mask: it is SDPA."""
    assert block_mask is None
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _enter(running: list[str], name: str, *_: Any) -> None:
    running.append(name)


def _leave(running: list[str], *_: Any) -> None:
    running.pop()


def tokens(tensor: Tensor, axes: str, grid: Grid, start: int = 0) -> Tensor:
    """Views a tensor as (B, frames, height, width, ...), what follows being one token."""
    if "i" in axes:
        tensor, axes = tensor.select(axes.index("i"), -1), axes.replace("i", "")
    if "n" in axes:
        count = grid[0] * grid[1] * grid[2]
        tensor = tensor.movedim(axes.index("n"), 1)
        return tensor[:, start : start + count].unflatten(1, grid)
    if "f" in axes:  # frames beyond the grid are conditions
        count = tensor.shape[axes.index("f")] // grid[0] * grid[0]
        tensor = tensor.narrow(axes.index("f"), 0, count)
    for axis in "fhw":
        if axis not in axes:
            axes, tensor = axes + axis, tensor.unsqueeze(-1)
    moved = tensor.permute([axes.index(axis) for axis in "bfhwc"])
    for number, side in zip((3, 2, 1), reversed(grid), strict=True):
        moved = moved.unflatten(number, (side, -1))
    return moved.permute(0, 1, 3, 5, 2, 4, 6, 7)


def ones_like(latents: Any) -> Any:
    """Returns ones instead of a tensor, of a list of tensors, of a list of such lists."""
    if isinstance(latents, list):
        return [ones_like(part) for part in latents]
    return torch.ones_like(latents)


def window_mask(layout: TokenLayout, blind_text: bool) -> Tensor:
    """Returns who sees whom, (N, N) bool: neighbourhoods as NATTEN defines them, moved inside."""
    seen = torch.ones(layout.length, layout.length, dtype=torch.bool)
    frames, height, width = layout.grid
    visual = torch.ones(1, 1, dtype=torch.bool)
    for side, reach in zip((frames, height, width), WINDOW, strict=True):
        place = torch.arange(side)
        first = (place - reach // 2).clamp(0, max(side - reach, 0))
        near = (place >= first[:, None]) & (place < first[:, None] + reach)
        visual = torch.kron(visual.int(), near.int()).bool()
    part = layout.visual_slice
    if blind_text:
        seen[:, part] = False
    seen[part, part] = visual
    return seen


def asking(layout: TokenLayout, count: int) -> Tensor:
    """Returns which tokens ask (N,) where `count` do.

    The visual ones, these and the text, or these and all that follows.
    """
    kinds = ("visual",) if count == layout.visual.length else ("visual", "text")
    asks = torch.cat([torch.tensor([x.kind in kinds]).expand(x.length) for x in layout.segments])
    if int(asks.sum()) != count:
        asks = torch.arange(layout.length) >= layout.length - count
    assert int(asks.sum()) == count and asks[layout.visual_slice].all()
    return asks


def both(window: Tensor, given: Tensor | None) -> Tensor:
    """Joins a bool mask and one as SDPA takes it."""
    if given is None:
        return window
    if given.dtype == torch.bool:
        return given & window
    return given.masked_fill(~window, -torch.inf)


def built(model_class: type, **config: Any) -> Any:
    """Returns a denoiser with random weights; what starts at zero is opened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = model_class(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0.0, 0.1)
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Returns normal random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(count: int, *valid: int) -> Tensor:
    """Returns a bool mask (B, count), one row for each number of valid tokens."""
    return torch.arange(count) < torch.tensor(valid)[:, None]


Builder = Callable[[], TinyModel]
