"""Rotary tables of a denoiser: what a scaling makes of them, and their exchange for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.bindings.axes import Axis, waves

Axes = tuple[Axis | None, Axis | None, Axis | None]


def rescaled_waves(
    tables: Sequence[Tensor],
    places: Sequence[Tensor],
    dims: Sequence[int],
    theta: float,
    axes: Axes,
) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of scaled axes; the columns of other axes stay as they are.

    Args:
        tables: Cosines and sines, each (N, D), the columns of all axes side by side and each
            frequency twice.
        places: Position of each row along each axis, (N,).
        dims: Columns of each axis.
        theta: Base of the frequencies.
        axes: What happens to frames, rows and columns.
    """
    columns = [
        kept if axis is None else waves(place.double(), dim, theta, axis)
        for *kept, place, dim, axis in zip(
            *(table.split(tuple(dims), 1) for table in tables), places, dims, axes, strict=True
        )
    ]
    cosine, sine = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
    return cosine, sine


@contextmanager
def replaced(owner: nn.Module, **parts: Any) -> Iterator[None]:
    """While active, a module has other tables, or another method."""
    places = vars(owner), owner._buffers
    before = {name: place[name] for place in places for name in parts if name in place}
    try:
        for name, part in parts.items():
            setattr(owner, name, part)
        yield
    finally:
        for name in parts:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextmanager
def output_changed(module: nn.Module, change: Callable[[tuple, dict, Any], Any]) -> Iterator[None]:
    """While active, a module returns `change(args, kwargs, output)`."""
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: change(args, kwargs, output), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rescaled_frequencies(
    rope: nn.Module, names: Sequence[str], axes: Axes, amplified: Callable[[Tensor, Any], Any]
) -> Iterator[None]:
    """While active, a module that computes its waves when it is called does so from others.

    Args:
        rope: The module.
        names: Its tables, one for each axis: frequencies (D / 2,), or angles (positions, D / 2).
        axes: What happens to frames, rows and columns.
        amplified: From factors on the frequencies of all axes (D / 2,), and an output of the
            module, to the output times these factors.
    """
    tables, factors = {}, []
    for name, axis in zip(names, axes, strict=True):
        table: Any = getattr(rope, name)
        factors.append(torch.full((table.shape[-1],), 1.0 if axis is None else axis.amplitude))
        if axis is None:
            continue
        frequencies = table if table.ndim == 1 else table[1]
        scaled = axis.rescaled(frequencies.double())
        if table.ndim == 2:
            scaled = torch.arange(len(table), device=table.device)[:, None] * scaled
        tables[name] = scaled.to(table)
    factor = torch.cat(factors)
    with ExitStack() as stack:
        stack.enter_context(replaced(rope, **tables))
        if not (factor == 1).all():
            change = output_changed(rope, lambda _, __, output: amplified(factor, output))
            stack.enter_context(change)
        yield


def grid_places(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Returns frame, row and column of each token of a grid, (N,) each, fp64."""
    axes = (torch.arange(size, device=device, dtype=torch.float64) for size in sizes)
    return [place.flatten() for place in torch.meshgrid(*axes, indexing="ij")]
