"""Picture measures on drawings of which the answer is known."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffaccel.quality.contact_sheet import (
    CELL,
    LABEL,
    MOST_BYTES,
    Shown,
    compose,
    grid,
    write_sheet,
)
from diffaccel.quality.pictures import (
    clip_edge_sharpness,
    edge_sharpness,
    flicker,
    gradient_agreement,
    psnr,
    ssim,
)
from diffaccel.quality.repetition import clip_repetition, loop, objects, repetition

YELLOW, BLUE = (250, 220, 100), (60, 120, 220)


def canvas(side, ground, paint, finer=4):
    """Draws at `finer` times the size and averages: edges as a vector renderer makes them."""
    image = Image.new("RGB", (side * finer,) * 2, ground)
    paint(ImageDraw.Draw(image), side * finer)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def apple(side, places=((0.5, 0.5),), radius=0.25, ground=BLUE):
    def paint(draw, s):
        for x, y in places:
            r = radius
            draw.ellipse([s * (x - r), s * (y - r), s * (x + r), s * (y + r)], (200, 20, 30))
            draw.ellipse([s * (x - r / 2), s * (y - r / 2), s * x, s * y], (250, 200, 200))
            draw.rectangle([s * (x - r / 12), s * (y - 1.3 * r), s * (x + r / 12), s * (y - r)],
                           (90, 50, 20))  # fmt: skip

    return canvas(side, ground, paint)


def rocket(side):
    def paint(draw, s):
        draw.rounded_rectangle([s * 0.42, s * 0.15, s * 0.58, s * 0.8], s * 0.07, (220, 220, 230))
        draw.polygon(
            [(s * 0.42, s * 0.6), (s * 0.3, s * 0.85), (s * 0.42, s * 0.8)], (200, 30, 30)
        )
        draw.ellipse([s * 0.46, s * 0.3, s * 0.54, s * 0.38], (30, 60, 200))

    return canvas(side, YELLOW, paint)


def enlarged(picture, factor, kind=Image.Resampling.LANCZOS):
    size = tuple(side * factor for side in picture.shape[1::-1])
    return np.asarray(Image.fromarray(picture).resize(size, kind))


NOISE = np.random.default_rng(0).integers(0, 256, (12, 96, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("picture", "count"),
    [
        (apple(256), 1),
        (apple(256, radius=0.38), 1),
        (rocket(192), 1),
        (np.concatenate([apple(192, ground=YELLOW), rocket(192)], 1), 2),
        (np.full((64, 64, 3), 90, np.uint8), 0),
    ],
    ids=["apple", "large-apple", "rocket", "apple-and-rocket", "nothing"],
)
def test_single_things_do_not_repeat(picture, count):
    assert repetition(picture) < 0.2
    assert objects(picture) == count


@pytest.mark.parametrize(
    ("picture", "least", "count"),
    [
        (np.tile(apple(128), (2, 2, 1)), 0.9, 4),
        (np.tile(rocket(64), (4, 4, 1)), 0.9, 16),
        (apple(512, ((0.27, 0.5), (0.73, 0.5)), 0.18), 0.9, 2),
        (apple(512, ((0.15, 0.2), (0.5, 0.3), (0.8, 0.15), (0.3, 0.7), (0.75, 0.65)), 0.1),
         0.3, 5),
    ],
    ids=["2x2", "4x4", "two", "five-anywhere"],
)  # fmt: skip
def test_many_things_repeat(picture, least, count):
    assert repetition(picture) > least
    assert objects(picture) == count


def test_textures_and_gradients_do_not_repeat():
    assert repetition(NOISE[0]) < 0.2
    ramp = np.broadcast_to(np.linspace(0, 255, 128)[:, None, None], (128, 96, 3)).astype(np.uint8)
    assert repetition(ramp) < 0.05 and objects(ramp) == 0


@pytest.mark.parametrize("draw", [apple, rocket])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_same_drawing_larger_is_as_sharp_and_a_mere_enlargement_is_not(draw, factor):
    native = draw(128)
    assert edge_sharpness(native, native) == pytest.approx(1.0)
    assert edge_sharpness(draw(128 * factor), native) == pytest.approx(1.0, abs=0.2)
    assert edge_sharpness(enlarged(native, factor), native) < 1.25 / factor
    blurred = enlarged(native, factor, Image.Resampling.BILINEAR)
    assert edge_sharpness(blurred, native) < edge_sharpness(enlarged(native, factor), native)


def test_clips():
    still = np.stack([apple(64)] * 12)
    swing = np.stack([apple(64, ((0.5 + 0.2 * np.sin(t * 0.628), 0.5),)) for t in range(30)])
    drift = np.stack([apple(64, ((0.2 + 0.02 * t, 0.5),)) for t in range(30)])
    assert flicker(still) == loop(still) == 0.0
    assert flicker(NOISE) == pytest.approx(1.0, abs=0.05)
    assert loop(swing) > 0.9 and loop(drift) < 0.1 and loop(NOISE) < 0.2
    assert flicker(NOISE[:1]) == 0.0
    assert clip_repetition(drift[:2]) < 0.15 < clip_repetition(np.tile(still[:2], (1, 2, 2, 1)))
    larger = np.stack([enlarged(frame, 2) for frame in drift[::3]])
    assert clip_edge_sharpness(larger, drift) < 0.7 < clip_edge_sharpness(drift[::3], drift)


def test_contact_sheets_hold_every_cell_and_stay_small(tmp_path):
    noise = NOISE[0].repeat(4, 0).repeat(4, 1)[None]
    shown = [Shown(f"row {n}", column, "sharpness 1.0, 2 s", noise) for n in range(9)
             for column in ("a", "b")]  # fmt: skip
    clip = Shown("row 9", "b", "flicker 1.0", NOISE)
    sheet = compose([*shown, clip], ("a", "b"))
    assert sheet.width > 2 * 2 * CELL and sheet.height > 10 * CELL * 3 // 4
    write_sheet(tmp_path / "sheet.jpg", shown, ("a", "b"))
    assert (tmp_path / "sheet.jpg").stat().st_size <= MOST_BYTES
    assert Image.open(tmp_path / "sheet.jpg").width > 100


def test_grids_hold_every_picture_in_order():
    colours = [(10 * n, 0, 0) for n in range(5)]
    pictures = [Image.new("RGB", (20, 30), colour) for colour in colours]
    plain = grid(pictures, 3)
    assert plain.size == (60, 60)
    assert [plain.getpixel((20 * (n % 3), 30 * (n // 3))) for n in range(5)] == colours
    assert plain.getpixel((59, 59)) == (255, 255, 255)
    labelled = grid(pictures, 8, [str(n) for n in range(5)])
    assert labelled.size == (100, 30 + LABEL)
    assert labelled.getpixel((99, LABEL)) == colours[-1]
    assert np.asarray(labelled)[:LABEL].min() < 128  # the labels


def test_agreement_with_the_truth():
    truth = apple(128)
    blurred = enlarged(apple(64), 2)
    noisy = np.clip(truth + np.random.default_rng(1).normal(0, 20, truth.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    assert psnr(truth, truth) == float("inf")
    assert psnr(truth, truth ^ 1) == pytest.approx(48.13, abs=0.01)
    assert gradient_agreement(truth, truth) == pytest.approx(1.0)
    assert gradient_agreement(blurred, truth) < 0.9
    assert gradient_agreement(noisy, truth) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_structural_similarity():
    pytest.importorskip("torchmetrics", reason="torchmetrics is in the extra `bench`")
    truth = apple(128)
    assert ssim(truth, truth) == pytest.approx(1.0)
    assert ssim(NOISE[0], NOISE[1]) < 0.1
    assert ssim(NOISE[0], truth[:96]) < ssim(enlarged(apple(64), 2), truth) < 0.99


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"diffaccel\[bench\]"):
        ssim(NOISE[0], NOISE[1])
