"""Position ids: what they tell about images, and rotary embeddings that are computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from diffaccel.bindings.axes import Axis, waves
from diffaccel.bindings.base import LayoutUnknown


def image_grids(ids: Tensor) -> list[tuple[int, int, int]]:
    """Reads the grids of consecutive images from their FLUX position ids.

    Ids may be scaled (position interpolation) or rounded (bf16 beyond 256): only their order
    counts.

    Args:
        ids: (tokens, A) or (B, tokens, A): image, row, column of each token, and further axes,
            by which images may be told apart too.

    Returns:
        (1, height, width) of each image, in their order.
    """
    rows = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    images = rows.clone()
    images[:, 1:3] = 0
    starts = [0, *(_changes(images)), len(rows)]
    parts = [rows[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
    return [(1, *_raster(part[:, 1:3])) for part in parts]


def _raster(places: Tensor) -> tuple[int, int]:
    """Returns (height, width) of one image's rows and columns, which must lie in raster order."""
    width = next(iter(_changes(places[:, :1])), len(places))
    if len(places) % width == 0:
        grid = places.reshape(-1, width, 2)
        is_row = (grid[..., 0] == grid[:, :1, 0]).all()
        is_column = (grid[..., 1] == grid[:1, :, 1]).all()
        if is_row and is_column:
            return len(places) // width, width
    raise LayoutUnknown("img_ids do not describe images in raster order")


def _changes(values: Tensor) -> list[int]:
    """Returns the positions at which values (tokens, A) differ from those before."""
    return (values[1:] != values[:-1]).any(1).nonzero().flatten().add(1).tolist()


@contextmanager
def scaled_embedding(
    embedding: Any, axes: tuple[Axis | None, Axis | None, Axis | None]
) -> Iterator[None]:
    """Exchanges the function from position ids (N, A) to cosines and sines (N, D).

    Args:
        embedding: A module with the base `theta` and with `axes_dim`, D of each axis.
        axes: What happens to the first three axes: image, row and column.
    """

    def forward(self: Any, ids: Tensor) -> tuple[Tensor, ...]:
        places = ids.cpu().double()
        origins = _origins(places)
        tables = [
            waves(places[:, number], dim, self.theta, axis, origins[:, number])
            for number, (dim, axis) in enumerate(zip(self.axes_dim, (*axes, None), strict=False))
        ]
        return tuple(torch.cat(parts, 1).to(ids.device) for parts in zip(*tables, strict=True))

    embedding.forward = MethodType(forward, embedding)
    try:
        yield
    finally:
        del embedding.forward


def _origins(places: Tensor) -> Tensor:
    """Returns the places from which scaled distances are counted, (N, A).

    Text may stand on a diagonal, one row and column for each token (LongCat-Image, Ovis-Image),
    with the images behind it: it stays where it is, and images grow from their corner.
    """
    order = torch.arange(len(places))
    is_text = ((places[:, 1] == order) & (places[:, 2] == order)).cumprod(0).bool()
    images = places[~is_text]
    corner = images.amin(0) if len(images) else places.new_zeros(places.shape[1])
    origins = torch.where(is_text[:, None], places, corner)
    origins[:, 0] = 0  # images are numbered from 0
    return origins
