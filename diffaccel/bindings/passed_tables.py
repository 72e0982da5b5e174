"""Scaled rotary positions where a pipeline passes the tables, or the positions, of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import pi, prod
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.bindings.axes import Axis, angles
from diffaccel.bindings.base import Binding, LayoutUnknown, ModelCall, forward_signature
from diffaccel.bindings.exchange import exchanged
from diffaccel.layout import Grid, TokenLayout


@contextmanager
def argument_changed(
    model: nn.Module, name: str, change: Callable[[Any, dict], Any]
) -> Iterator[None]:
    """While active, a denoiser gets `change(value, arguments)` for one argument, if it has it.

    What a value becomes is kept until another one comes: pipelines pass the same at every step.
    """
    known: list[tuple[Any, Any]] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        bound = forward_signature(type(module)).bind_partial(module, *args, **kwargs)
        given = bound.arguments.get(name)
        if given is None:
            return args, kwargs
        if not known or known[0][0] is not given:
            known[:] = [(given, change(given, bound.arguments))]
        bound.arguments[name] = known[0][1]
        return bound.args[1:], bound.kwargs

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def rescaled_rows(rows: Tensor, axis: Axis | None) -> Tensor:
    """Returns the rotations of the places of one axis, their frequencies scaled.

    The first place keeps its angles, and the distances from it change.

    Args:
        rows: Rotations (n, D / 2), complex, of places at equal distances, less than pi radians
            from one to the next.
        axis: What happens to the frequencies, read from the rows in radians per token.
    """
    if axis is None:
        return rows
    wide = rows.to(torch.complex128)
    last = len(rows) - 1
    if last < 1:
        return (axis.amplitude * wide).to(rows)
    turned = wide * wide[0].conj()
    # The last row tells a frequency best, and the second one how many turns it has made.
    whole = ((last * turned[1].angle() - turned[last].angle()) / (2 * pi)).round()
    scaled = axis.rescaled((turned[last].angle() + 2 * pi * whole) / last)
    places = torch.arange(len(rows), dtype=torch.float64, device=rows.device)
    found = places[:, None] * scaled
    return (torch.polar(torch.full_like(found, axis.amplitude), found) * wide[0]).to(rows)


def rescaled_grid(
    tables: tuple[Tensor, Tensor],
    sides: Sequence[int],
    dims: Sequence[int],
    axes: Sequence[Axis | None],
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (N, D) of a grid in raster order, its axes scaled.

    Args:
        tables: As the pipeline made them, each frequency twice side by side.
        sides: Tokens along each axis of the grid.
        dims: Columns of each axis, in the order of the axes.
        axes: What happens to each axis; None for nothing.
    """
    cosine, sine = tables
    if len(cosine) != prod(sides):
        raise LayoutUnknown(
            f"the rotary tables have {len(cosine)} rows, and the grid {prod(sides)} tokens"
        )
    table = torch.complex(cosine[:, ::2].double(), sine[:, ::2].double())
    parts = list(table.unflatten(0, tuple(sides)).split([dim // 2 for dim in dims], -1))
    for number, axis in enumerate(axes):
        rows = parts[number].movedim(number, 0)
        first = rows.reshape(len(rows), -1, rows.shape[-1])[:, 0]
        scaled = rescaled_rows(first, axis)
        scaled = scaled.reshape(len(rows), *(1,) * (len(sides) - 1), -1)
        parts[number] = scaled.expand_as(rows).movedim(0, number)
    table = torch.cat(parts, -1).flatten(0, -2)
    return (
        table.real.repeat_interleave(2, 1).to(cosine),
        table.imag.repeat_interleave(2, 1).to(sine),
    )


def packed_angles(
    places: Tensor,
    frequencies: Sequence[Tensor],
    axes: Sequence[Axis | None],
    layout: TokenLayout,
) -> list[Tensor]:
    """Returns angles (N, D / 2) of each axis of a packed sequence, fp64.

    Text, and what lies before the first frame, row or column of the video to denoise, keeps its
    angles; the video, and audio beside it, keep their start.

    Args:
        places: Frame, row and column of each token (N, 3), in any unit.
        frequencies: Those of each axis, (D / 2,), in radians per unit, fastest first.
        axes: What happens to each axis.
        layout: Of the sequence.
    """
    places = places.double()
    text = torch.cat([torch.tensor([s.kind == "text"]).expand(s.length) for s in layout.segments])
    text = text.to(places.device)
    found = []
    for number, (own, axis) in enumerate(zip(frequencies, axes, strict=True)):
        place = places[:, number]
        rows = along(place[layout.visual_slice], layout.grid, number)
        spacing = (rows[-1] - rows[0]) / max(len(rows) - 1, 1)
        step = float(spacing) or 1.0
        origins = torch.where(text, place, place.clamp(max=rows[0])) / step
        found.append(angles(place / step, own.double() * step, axis, origins))
    return found


def amplitudes(axes: Sequence[Axis | None], like: Tensor) -> Tensor:
    """Returns the factor on the waves of each axis, (axes,) fp64."""
    found = [1.0 if axis is None else axis.amplitude for axis in axes]
    return torch.tensor(found, dtype=torch.float64, device=like.device)


def along(places: Tensor, grid: Grid, number: int) -> Tensor:
    """Returns the places (n,) of the first tokens along one axis of a grid (N,)."""
    lines = places.unflatten(0, grid).movedim(number, 0)
    return lines.reshape(grid[number], -1)[:, 0]


@contextmanager
def packed_rope(
    binding: Binding,
    model: Any,
    rope: nn.Module,
    waves: Callable[..., tuple[Tensor, Tensor]],
) -> Iterator[None]:
    """While active, a position embedding knows the layout of the sequence.

    Args:
        binding: That of the denoiser.
        model: The denoiser, called with `position_ids`.
        rope: Its position embedding.
        waves: Called as (layout, ...) in the place of the embedding's forward.
    """
    layouts: list[TokenLayout] = []

    def seen(places: Tensor, arguments: dict[str, Any]) -> Tensor:
        layouts[:] = [binding.layout(model, ModelCall(arguments, {}), binding.layers(model)[0])]
        return places

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return waves(layouts[0], *args, **kwargs)

    with argument_changed(model, "position_ids", seen), exchanged(rope, "forward", forward):
        yield
