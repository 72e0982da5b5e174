"""Measures of what repeats: objects in a picture, moments in a clip.

A model that is run above the size on which it was trained repeats its subject. That can be
measured without knowing the right picture, which nobody has for a given prompt. All are own
designs; none says whether a picture is good, and none replaces looking at it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

Array = np.ndarray

_SIDE = 96  # pixels of the longer side at which shapes are compared
_LEAST_OBJECT = 0.004  # of the area; smaller specks are no objects
_LEAST_EVIDENCE = 0.1  # of the energy that both overlapping parts must hold
_LEAST_OVERLAP = 0.2  # of the area


def repetition(picture: Array) -> float:
    """How well the picture matches a shifted copy of itself, 0 to 1.

    The largest peak, apart from that at no shift, of the normalised autocorrelation of the
    picture's mid frequencies (broad gradients and the finest detail are taken out), over shifts
    that leave a fifth of the area in common. A peak counts by how far it rises above the lowest
    point on the way to it from no shift: a long object also matches itself when shifted along its
    length, but by ever less, and so does not count. 1 for a picture tiled 2 x 2, low for one
    object and for a random texture. Several like objects score the higher the more regularly they
    stand; `objects` counts those that do not.

    Args:
        picture: (H, W, 3) uint8.
    """
    matches = _autocorrelation(_mid_frequencies(_small(picture)))
    return _highest_peak(matches)


def objects(picture: Array) -> int:
    """Counts the separate things in front of a plain or evenly graded background.

    The background is the plane that fits the colours of the border best; what differs from it
    and hangs together is one thing. "One apple" is 1, "many apples" more. Means nothing for
    pictures without such a background.

    Args:
        picture: (H, W, 3) uint8.
    """
    pixels = _small(picture)
    height, width, _ = pixels.shape
    rows, columns = np.mgrid[0:height, 0:width]
    plane = np.stack([np.ones_like(rows), rows / height, columns / width], -1).astype(float)
    is_border = (rows < 2) | (rows >= height - 2) | (columns < 2) | (columns >= width - 2)
    # the colours that most of the border has, in case things touch it
    border = pixels[is_border]
    usual = np.abs(border - np.median(border, axis=0)).max(-1) < 0.35
    fit, *_ = np.linalg.lstsq(plane[is_border][usual], border[usual], rcond=None)
    differs = np.abs(pixels - plane @ fit).max(-1) > 0.12
    return sum(size >= _LEAST_OBJECT * height * width for size in _component_sizes(differs))


def clip_repetition(clip: Array) -> float:
    """Mean `repetition` of the frames of a clip (F, H, W, 3) uint8."""
    return float(np.mean([repetition(frame) for frame in clip]))


def loop(clip: Array) -> float:
    """How well the clip matches itself at a later time, after it has looked different: 0 to 1.

    As `repetition`, along time: long videos that start over score high, stills and steady motion
    low.

    Args:
        clip: (F, H, W, 3) uint8.
    """
    frames = np.stack([_small(frame, 32) for frame in clip]).reshape(len(clip), -1)
    frames -= frames.mean(0)
    energy = np.square(frames).sum(1)
    matches = [1.0]
    for lag in range(1, len(frames) * 3 // 4):
        both = np.sqrt(energy[lag:].sum() * energy[:-lag].sum())
        matches.append(float((frames[lag:] * frames[:-lag]).sum() / max(both, 1e-12)))
    rises = [
        matches[lag] - max(0.0, min(matches[:lag]))
        for lag in range(1, len(matches) - 1)
        if matches[lag] >= max(matches[lag - 1], matches[lag + 1])
    ]
    return float(np.clip(max(rises, default=0.0), 0.0, 1.0))


def _small(picture: Array, side: int = _SIDE) -> Array:
    """Scales to `side` pixels on the longer side; (h, w, 3) in 0 to 1."""
    image = Image.fromarray(picture)
    factor = side / max(image.size)
    width, height = (max(8, round(length * factor)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) / 255.0


def _mid_frequencies(pixels: Array) -> Array:
    """Takes out what is broader than a sixth of the picture or finer than two pixels."""
    spectrum = np.fft.rfft2(_mirrored(pixels), axes=(0, 1))
    height, width = 2 * pixels.shape[0], 2 * pixels.shape[1]
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    square = (rows**2 + columns**2)[..., None] * (2 * np.pi) ** 2
    broad = max(pixels.shape) / 6
    kept = np.exp(-square / 2) - np.exp(-square * broad**2 / 2)
    both = np.fft.irfft2(spectrum * kept, s=(height, width), axes=(0, 1))
    return both[: pixels.shape[0], : pixels.shape[1]]


def _mirrored(pixels: Array) -> Array:
    """Doubles both axes by mirroring, so that opposite borders do not meet."""
    doubled = np.concatenate([pixels, pixels[::-1]], 0)
    return np.concatenate([doubled, doubled[:, ::-1]], 1)


def _autocorrelation(features: Array) -> Array:
    """Match (h, w) of (H, W, C) features with themselves for shifts of a half-plane.

    Each shift is normalised by the energy of the two parts that overlap, so that borders do not
    count. Parts that hold less than half of the picture's energy count for less, and for nothing
    below a tenth. Entry [y, x] is the shift (y, x - W + 1).
    """
    height, width, _ = features.shape
    shape = (2 * height, 2 * width)
    energy = np.square(features).sum(-1)

    def correlated(first: Array, second: Array) -> Array:
        spectra = (np.fft.rfft2(x, s=shape, axes=(0, 1)) for x in (first, second))
        left, right = spectra
        return np.fft.irfft2(left * right.conj(), s=shape, axes=(0, 1))

    matches = correlated(features, features).sum(-1)
    ones = np.ones((height, width))
    # energy of the part that a shift leaves in the picture, and in its copy
    kept, copied = correlated(energy, ones), correlated(ones, energy)
    area = correlated(ones, ones)
    evidence = np.minimum(kept, copied) / max(energy.sum(), 1e-12)
    enough = (evidence > _LEAST_EVIDENCE) & (area > _LEAST_OVERLAP * height * width)
    result = np.where(enough, matches / np.sqrt(np.maximum(kept * copied, 1e-12)), 0.0)
    result *= np.minimum(1.0, 2.0 * evidence)  # a half of the picture that matches the other: all
    columns = np.arange(-width + 1, width) % shape[1]
    return result[:height][:, columns]


def _highest_peak(matches: Array) -> float:
    """The largest rise of a local maximum above the lowest point on the way from no shift."""
    height, width = matches.shape
    centre = (width - 1) // 2
    padded = np.pad(matches, 1, constant_values=-1.0)
    # shifts of one picture and of its copy are opposite: row 0 continues in itself, turned round
    padded[0, 1:-1] = matches[min(1, height - 1)][::-1]
    around = [
        padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
        if (y, x) != (0, 0)
    ]
    is_peak = (matches >= np.max(around, axis=0)) & (matches > 0.05)
    best = 0.0
    for y, x in np.argwhere(is_peak):
        if (y, x) == (0, centre):
            continue
        way = np.linspace(0.0, 1.0, 2 * max(y, abs(x - centre)) + 1)
        rows = (way * y).round().astype(int)
        columns = (centre + way * (x - centre)).round().astype(int)
        lowest = max(0.0, float(matches[rows, columns].min()))
        best = max(best, float(matches[y, x]) - lowest)
    return min(best, 1.0)


def _component_sizes(mask: Array) -> list[int]:
    """Sizes of the parts of a mask that hang together, corners included."""
    left = {tuple(place) for place in np.argwhere(mask)}
    sizes = []
    while left:
        front, size = [left.pop()], 0
        while front:
            row, column = front.pop()
            size += 1
            near = {(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1)} & left
            left -= near
            front += near
        sizes.append(size)
    return sizes
