"""Which grids lie one after the other in a packed sequence, by the positions of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.bindings.base import LayoutUnknown
from diffaccel.layout import Grid


def packed_grids(places: Tensor, spans: Tensor | None = None) -> list[Grid]:
    """Reads (frames, height, width) of videos that follow one another.

    Args:
        places: Frame, row and column of each token, (N, 3), in any unit. Times rise within a
            video, whose frames are alike; a video ends where they do not.
        spans: How long the frame of each token lasts, (N,): a shorter one than the one before
            begins another video, as keyframes do.

    Raises:
        LayoutUnknown: The tokens are not frames in raster order.
    """
    places = places.double().cpu()
    spans = torch.zeros(len(places)) if spans is None else spans.double().cpu()
    turns = (places[1:, 0] != places[:-1, 0]).nonzero().flatten() + 1
    videos: list[list[Tensor]] = []
    latest = 0.0
    for image, span in zip(places.tensor_split(turns), spans.tensor_split(turns), strict=True):
        before = videos[-1][-1] if videos else image
        is_next = videos and image[0, 0] > before[0, 0] and float(span[0]) >= 0.99 * latest
        if is_next and torch.equal(image[:, 1:], before[:, 1:]):
            videos[-1].append(image)
        else:
            videos.append([image])
        latest = float(span[0])
    return [(len(video), *_raster(video[0][:, 1:])) for video in videos]


def last_run(indices: Tensor) -> tuple[int, int]:
    """Returns where the last places (N,) that follow one another begin and end, (0, 0) of none."""
    places = indices.cpu()
    jumps = (places.diff() != 1).nonzero().flatten()
    if not len(places):
        return 0, 0
    return int(places[int(jumps[-1]) + 1 if len(jumps) else 0]), int(places[-1]) + 1


def _raster(image: Tensor) -> tuple[int, int]:
    """Returns (height, width) of the rows and columns (N, 2) of one frame."""
    rows, columns = image[:, 0].unique(), image[:, 1].unique()
    if not torch.equal(torch.cartesian_prod(rows, columns), image):
        raise LayoutUnknown("the positions of the tokens are not those of frames in raster order")
    return len(rows), len(columns)
