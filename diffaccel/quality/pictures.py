"""Measures of what goes wrong above the size on which a model was trained.

A model that is run too large repeats its subject, and a picture that is only enlarged is blurred.
Both can be measured without knowing the right picture, which nobody has for a given prompt. All
but `psnr`, which needs it, are own designs; none says whether a picture is good, and none replaces
looking at it.
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


def sharpness(picture: Array, native: Array) -> float:
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


def clip_repetition(clip: Array) -> float:
    """Mean `repetition` of the frames of a clip (F, H, W, 3) uint8."""
    return float(np.mean([repetition(frame) for frame in clip]))


def clip_sharpness(clip: Array, native: Array) -> float:
    """Mean `sharpness` of the frames of a clip (F, H, W, 3) against a native one (G, h, w, 3).

    Frames are paired by their place in time.
    """
    partners = np.linspace(0, len(native) - 1, len(clip)).round().astype(int)
    pairs = zip(clip, native[partners], strict=True)
    return float(np.mean([sharpness(frame, other) for frame, other in pairs]))


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
    size = tuple(max(8, round(length * factor)) for length in image.size)
    return np.asarray(image.resize(size, Image.Resampling.BOX), dtype=float) / 255


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
