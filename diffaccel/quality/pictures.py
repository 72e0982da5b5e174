"""Measures of pictures and clips against another: the truth, the native sample, the next frame.

Arrays are uint8, (H, W, 3) a picture and (F, H, W, 3) a clip. No measure says whether a picture
is good, and none replaces looking at it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def edge_sharpness(picture: Array, native: Array) -> float:
    """Sharpness of edges in terms of the native sample's, 1 where they are as many pixels wide.

    The energy of the finest octave (what varies inside squares of 2 x 2 pixels), times the
    factor of enlargement, over the same of the native sample. The same drawing on a larger canvas
    has edges of equal width on a smaller share of its pixels, which the factor makes up for: it
    scores 1. An edge that is w times as wide has a w-th of the energy: a picture that is merely
    enlarged by s scores about 1 / s. Noise and invented texture score above 1.

    Args:
        picture: (H, W, 3) uint8.
        native: (h, w, 3) uint8, a picture of the same content at native size.
    """
    scale = np.sqrt(picture.shape[0] * picture.shape[1] / (native.shape[0] * native.shape[1]))
    return float(scale * _finest_energy(picture) / max(_finest_energy(native), 1e-12))


def psnr(picture: Array, truth: Array) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures, infinite where they are equal."""
    error = np.square(picture.astype(float) - truth).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(picture: Array, truth: Array) -> float:
    """Structural similarity of two pictures, 1 where they are equal.

    Source: "Image quality assessment: from error visibility to structural similarity" (Wang et
    al., 2004, https://doi.org/10.1109/TIP.2003.819861), windows of 11 x 11 with a deviation of
    1.5, by torchmetrics.

    Args:
        picture: (H, W, 3) uint8, 11 pixels along each side at least.
        truth: The same size.

    Raises:
        ImportError: torchmetrics is missing.
    """
    import torch

    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError(
            "ssim needs torchmetrics, of the extra bench; pip install 'diffaccel[bench]'"
        ) from error
    one, other = (torch.from_numpy(x / 255.0).permute(2, 0, 1)[None] for x in (picture, truth))
    similarity: Any = structural_similarity_index_measure(one, other, data_range=1.0)
    return float(similarity)


def gradient_agreement(picture: Array, truth: Array) -> float:
    """Share of the truth's edges that is there: how far gradients agree, 1 for equal pictures.

    Gradients of the picture are projected on those of the truth, so that noise does not count.
    Own design.

    Args:
        picture: (H, W, 3) uint8.
        truth: The same size.
    """
    found, wanted = (
        np.concatenate([np.diff(x.astype(float), axis=axis).ravel() for axis in (0, 1)])
        for x in (picture, truth)
    )
    return float((found @ wanted) / (wanted @ wanted))


def clip_edge_sharpness(clip: Array, native: Array) -> float:
    """Mean `edge_sharpness` of the frames of a clip against those of a native one (G, h, w, 3).

    Frames are paired by their place in time.
    """
    partners = np.linspace(0, len(native) - 1, len(clip)).round().astype(int)
    pairs = zip(clip, native[partners], strict=True)
    return float(np.mean([edge_sharpness(frame, other) for frame, other in pairs]))


def flicker(clip: Array) -> float:
    """Share of the finest detail that is new in the next frame: 0 for a still, 1 for noise.

    Half the energy of the change of the finest octave, over its energy. Motion counts too, so
    compare with the native clip's.

    Args:
        clip: (F, H, W, 3) uint8.
    """
    if len(clip) < 2:
        return 0.0
    details = np.stack([_finest_octave(frame) for frame in clip])
    change = np.square(np.diff(details, axis=0)).mean() / 2
    return float(change / max(np.square(details).mean(), 1e-12))


def _finest_octave(picture: Array) -> Array:
    """Deviations from the means of 2 x 2 squares, of the brightness in 0 to 1."""
    grey = picture.astype(float).mean(-1) / 255
    grey = grey[: grey.shape[0] // 2 * 2, : grey.shape[1] // 2 * 2]
    squares = grey.reshape(grey.shape[0] // 2, 2, grey.shape[1] // 2, 2)
    return squares - squares.mean((1, 3), keepdims=True)


def _finest_energy(picture: Array) -> float:
    """Mean square of the finest octave, over both placements of the squares."""
    shifted = picture[1:, 1:] if min(picture.shape[:2]) > 2 else picture
    return float(
        (np.square(_finest_octave(picture)).mean() + np.square(_finest_octave(shifted)).mean()) / 2
    )
