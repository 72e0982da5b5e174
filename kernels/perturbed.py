"""Attention whose map is replaced by a damaged one, without ever building a map.

Each function returns what the damaged map would give; a mixture of two maps is the same mixture
of two outputs, because attention is linear in its map.

Sources: identity map and its mixture: "Self-Rectifying Diffusion Sampling with
Perturbed-Attention Guidance" (Ahn et al., 2024, https://arxiv.org/abs/2403.17377) and
"Fine-Grained Perturbation Guidance via Attention Head Selection" (Ahn et al., 2025,
https://arxiv.org/abs/2506.10978); blurred queries: "Smoothed Energy Guidance" (Hong, 2024,
https://arxiv.org/abs/2408.00760).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.dense import dense_attention

ROWS = 4096  # queries whose text scores are held at a time


def uniform_attention(value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """Every query attends to all valid keys equally.

    Args:
        value: (B, N, H, D).
        key_padding_mask: (B, N) bool, True where a key may be attended.

    Returns:
        (B, 1, H, D), the same for every query.
    """
    if key_padding_mask is None:
        return value.mean(1, keepdim=True)
    valid = key_padding_mask[:, :, None, None]
    total = value.masked_fill(~valid, 0.0).sum(1, keepdim=True)
    return total / valid.sum(1, keepdim=True).clamp(min=1).to(value.dtype)


def mean_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Every query is replaced by the mean of all: smoothed energy without end.

    Args:
        query: (B, N, H, D), the queries that are averaged.
        key: (B, M, H, D).
        value: (B, M, H, D).
        scale: Factor on the scores, D ** -0.5 by default.
        key_padding_mask: (B, M) bool.

    Returns:
        (B, 1, H, D), the same for every query.
    """
    mean = query.mean(1, keepdim=True)
    return dense_attention(mean, key, value, scale=scale, key_padding_mask=key_padding_mask)


def blurred_queries(query: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Blurs queries over rows and columns of their grid, each frame on its own.

    Weights are a Gaussian over the whole axis, divided by their sum, so that constant queries
    stay constant at borders, sigma -> 0 changes nothing and sigma -> infinity gives the mean.

    Args:
        query: (B, frames * height * width, H, D).
        grid: (frames, height, width).
        sigma: Standard deviation in tokens, above 0; infinity for the mean.

    Returns:
        As query.
    """
    batch, _, heads, dim = query.shape
    blurred = _wide(query).reshape(batch, *grid, heads * dim)
    for axis, equation in ((1, "yx,btxwc->btywc"), (2, "yx,bthxc->bthyc")):
        weights = _gaussian_weights(grid[axis], sigma, blurred)
        blurred = torch.einsum(equation, weights, blurred)
    return blurred.reshape(query.shape).to(query.dtype)


def self_and_text_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    *,
    scale: float | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    """Image tokens attend to themselves and to the text, to no other image token.

    The softmax runs over these keys alone, as if the other scores had been minus infinity.

    Args:
        query: (B, N, H, D) of the image tokens.
        key: (B, N, H, D) of the image tokens.
        value: (B, N, H, D) of the image tokens.
        text_key: (B, T, H, D).
        text_value: (B, T, H, D).
        scale: Factor on the scores, D ** -0.5 by default.
        text_mask: (B, T) bool, True where a text key may be attended; at least one each.

    Returns:
        (B, N, H, D).
    """
    if not text_key.shape[1]:
        return value
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    own = (_wide(query) * _wide(key)).sum(-1) * scale
    share = torch.sigmoid(own - _text_lse(query, text_key, scale, text_mask))[..., None]
    text = dense_attention(query, text_key, text_value, scale=scale, key_padding_mask=text_mask)
    return torch.lerp(_wide(text), _wide(value), share).to(value.dtype)


def image_mass_to_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_image: Tensor,
    rows: slice,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Image tokens give all the attention that they pay to the image to themselves.

    What they pay to the text stays as it is, so that rows still sum to 1 without a new softmax.

    Args:
        query: (B, L, H, D) of the whole sequence.
        key: (B, L, H, D).
        value: (B, L, H, D).
        is_image: (L,) bool.
        rows: Where the image tokens lie.
        scale: Factor on the scores, D ** -0.5 by default.
        key_padding_mask: (B, L) bool.

    Returns:
        (B, N, H, D) for the image rows.
    """
    options: dict[str, Any] = {"scale": scale, "key_padding_mask": key_padding_mask}
    text = (~is_image)[None, :, None, None].to(value.dtype)
    # With 1 for the values of the text and 0 elsewhere, attention returns its mass.
    mass = dense_attention(query[:, rows], key, text.expand_as(value), **options)
    kept = dense_attention(query[:, rows], key, value * text, **options)
    return kept + (1 - mass) * value[:, rows]


def _wide(tokens: Tensor) -> Tensor:
    """Converts to fp32 where the tokens are narrower."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def _gaussian_weights(length: int, sigma: float, like: Tensor) -> Tensor:
    """Rows (length, length) of a Gaussian around each place, each with sum 1."""
    place = torch.arange(length, device=like.device, dtype=like.dtype)
    return (-0.5 * ((place[:, None] - place) / sigma) ** 2).softmax(-1)


def _text_lse(query: Tensor, text_key: Tensor, scale: float, text_mask: Tensor | None) -> Tensor:
    """Natural logarithm (B, N, H) of the summed exponentials of the text scores."""
    parts = []
    for rows in query.split(ROWS, dim=1):
        scores = torch.einsum("bnhd,bthd->bnht", _wide(rows), _wide(text_key)) * scale
        if text_mask is not None:
            scores = scores.masked_fill(~text_mask[:, None, None, :], float("-inf"))
        parts.append(scores.logsumexp(-1))
    return torch.cat(parts, 1)
