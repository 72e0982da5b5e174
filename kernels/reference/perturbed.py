"""Oracle of perturbed attention: explicit maps in fp64, from the definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_map(
    query: Tensor, key: Tensor, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The softmax map (B, H, N, M) of heads-last query and key, fp64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query.double(), key.double()) * scale
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None, :], -math.inf)
    return scores.softmax(-1)


def apply_map(weights: Tensor, value: Tensor) -> Tensor:
    """Applies a map (B, H, N, M) to values (B, M, H, D)."""
    return torch.einsum("bhnm,bmhd->bnhd", weights, value.double())


def identity_map(like: Tensor) -> Tensor:
    """Each query attends to itself alone."""
    return torch.eye(like.shape[-1], dtype=torch.float64).expand_as(like)


def uniform_map(like: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """Each query attends to all valid keys equally."""
    if key_padding_mask is None:
        return torch.full_like(like, 1 / like.shape[-1])
    valid = key_padding_mask[:, None, None, :].double().expand_as(like)
    return valid / valid.sum(-1, keepdim=True)


def isolated_image_map(query: Tensor, key: Tensor, is_image: Tensor, scale: float) -> Tensor:
    """Scores between different image tokens are minus infinity; text rows stay dense."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query.double(), key.double()) * scale
    hidden = is_image[:, None] & is_image[None] & ~torch.eye(len(is_image), dtype=torch.bool)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def image_mass_on_diagonal(weights: Tensor, is_image: Tensor) -> Tensor:
    """Image rows move what they pay to image tokens onto themselves; text rows stay."""
    moved = weights.clone()
    for row in is_image.nonzero().flatten().tolist():
        mass = weights[..., row, is_image].sum(-1)
        moved[..., row, is_image] = 0.0
        moved[..., row, row] = mass
    return moved


def blurred_grid(query: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Queries as Gaussian-weighted means over rows and columns of their frame, fp64."""
    frames, height, width = grid
    source = query.double().reshape(len(query), frames, height, width, *query.shape[2:])
    target = torch.zeros_like(source)
    for row in range(height):
        for column in range(width):
            weights = torch.zeros(height, width, dtype=torch.float64)
            for y in range(height):
                for x in range(width):
                    distance = (y - row) ** 2 + (x - column) ** 2
                    weights[y, x] = math.exp(-0.5 * distance / sigma**2)
            weights /= weights.sum()
            target[:, :, row, column] = torch.einsum("yx,btyxhd->bthd", weights, source)
    return target.reshape(query.shape)
