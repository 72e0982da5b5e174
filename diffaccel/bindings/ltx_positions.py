"""Coordinates of the packed tokens of LTX-Video and LTX-2: which grids they are, scaled angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.bindings.axes import Axis
from diffaccel.bindings.base import LayoutUnknown
from diffaccel.bindings.packed import packed_grids
from diffaccel.layout import Segment

Axes = tuple[Axis | None, Axis | None, Axis | None]


def packed_segments(coords: Tensor) -> tuple[Segment, ...]:
    """Reads which videos are packed one after the other, the longest being the one to denoise.

    Frames that an image or a video conditions lie before or after it, at times of their own.

    Args:
        coords: Frame, row and column of each token, (B, 3, N), or where it begins and ends,
            (B, 3, N, 2); in any unit.

    Raises:
        LayoutUnknown: The tokens are not frames in raster order.
    """
    coords = coords.cpu()
    if not (coords == coords[:1]).all():
        raise LayoutUnknown("video_coords differ between the samples of the batch")
    if coords.ndim == 4:
        begins, ends = coords[0].unbind(-1)
        grids = packed_grids(begins.T, (ends - begins)[0])
    else:
        grids = packed_grids(coords[0].T)
    longest = max(range(len(grids)), key=lambda index: math.prod(grids[index]))
    if 2 * math.prod(grids[longest]) < coords.shape[2]:
        raise LayoutUnknown("video_coords tell of no video that is half of the tokens, or more")
    return tuple(
        Segment("visual" if index == longest else "condition", math.prod(grid), grid)
        for index, grid in enumerate(grids)
    )


def scaled_forward(axes: Axes) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a forward of LTX-Video's position embedding whose axes are scaled."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: Any = None,
        video_coords: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if video_coords is None:
            grid = self._prepare_video_coords(
                len(hidden_states), num_frames, height, width, rope_interpolation_scale,
                hidden_states.device,
            )  # fmt: skip
        else:
            most = video_coords.new_tensor(
                [self.base_num_frames, self.base_height, self.base_width]
            )
            grid = video_coords.mT / most
        cosine, sine = _waves(grid, self.dim // 6, self.theta, axes)
        padding = self.dim % 6
        cosine, sine = (x.repeat_interleave(2, dim=-1) for x in (cosine, sine))
        return F.pad(cosine, (padding, 0), value=1.0), F.pad(sine, (padding, 0))

    return forward


def scaled_forward_2(axes: Axes) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a forward of LTX-2's position embedding of the video whose axes are scaled."""

    def forward(self: Any, coords: Tensor, device: Any = None) -> tuple[Tensor, Tensor]:
        places = coords.mean(-1) if coords.ndim == 4 else coords
        grid = (places.mT / places.new_tensor(_most(self))).to(device or coords.device)
        dtype = torch.float64 if self.double_precision else torch.float32
        cosine, sine = _waves(grid, self.dim // 6, self.theta, axes, dtype)
        if self.rope_type == "interleaved":
            cosine, sine = (x.repeat_interleave(2, dim=-1) for x in (cosine, sine))
            padding = self.dim % 6
        else:
            padding = self.dim // 2 - cosine.shape[-1]
        cosine, sine = F.pad(cosine, (padding, 0), value=1.0), F.pad(sine, (padding, 0))
        if self.rope_type == "split":
            heads = self.num_attention_heads
            cosine, sine = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (cosine, sine))
        return cosine, sine

    return forward


def _most(embedding: Any) -> tuple[float, float, float]:
    """Returns the coordinates that count as one, of frames, rows and columns."""
    return embedding.base_num_frames, embedding.base_height, embedding.base_width


def _waves(
    grid: Tensor, count: int, theta: float, axes: Axes, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, N, 3 * count) fp32 of coordinates (B, N, 3), as shares of the most.

    Frequencies ascend, those of the three axes side by side. The first token of an axis keeps its
    angle; the step from token to token is the one that most of them have.
    """
    order = torch.linspace(0, 1, count, dtype=dtype, device=grid.device)
    plain = (theta**order * math.pi / 2.0).float()
    angles, amplitudes = [], []
    for places, axis in zip(grid.unbind(-1), axes, strict=True):
        turned = plain * (places.unsqueeze(-1) * 2 - 1)
        distinct = places.unique()
        if axis is not None and len(distinct) > 1:
            radians = 2 * distinct.diff().median().double()  # of the slowest, per token
            scaled = axis.rescaled((radians * plain.double()).flip(0)).flip(0) / radians
            scaled = scaled.float()
            turned = scaled * (places.unsqueeze(-1) * 2 - 1)
            turned = turned + (plain - scaled) * (distinct[0] * 2 - 1)
        angles.append(turned)
        amplitudes.append(1.0 if axis is None else axis.amplitude)
    packed = torch.stack(angles, -1)
    factors = packed.new_tensor(amplitudes)
    cosine, sine = ((factors * wave).flatten(2) for wave in (packed.cos(), packed.sin()))
    return cosine, sine
