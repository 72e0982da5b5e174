"""Puts pictures side by side: in a plain grid, or in a table with captions and details."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffaccel.files import replacing

CELL = 176  # pixels of the longer side of a picture in the sheet
LINE = 15  # pixels of a line of text
LABEL = 22  # pixels above a picture of a grid
MOST_BYTES = 300_000


@dataclass(frozen=True, slots=True)
class Shown:
    """One cell.

    Args:
        row: Heading of its row.
        column: Heading of its column.
        caption: What is written below; parts after ", " may move to a second line.
        frames: (F, H, W, 3) uint8; a picture has one frame.
    """

    row: str
    column: str
    caption: str
    frames: np.ndarray


def grid(
    pictures: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None
) -> Image.Image:
    """Lays pictures of one size out line by line.

    Args:
        pictures: At least one.
        columns: Pictures of a line, at most.
        labels: What stands above each; nothing, and no room for it, by default.
    """
    width, height = pictures[0].size
    columns, above = min(columns, len(pictures)), 0 if labels is None else LABEL
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, lines * (height + above)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, picture in enumerate(pictures):
        left, top = index % columns * width, index // columns * (height + above)
        if labels is not None:
            draw.text((left + 6, top + 4), labels[index], "black", font)
        sheet.paste(picture, (left, top + above))
    return sheet


def write_sheet(path: Path, shown: Sequence[Shown], columns: Sequence[str]) -> None:
    """Writes the sheet as JPEG of at most 300 KB, smaller where that is not enough.

    Args:
        path: A .jpg file, complete or absent.
        shown: The cells; a row without a cell in a column stays empty there.
        columns: Order of the columns.
    """
    sheet = compose(shown, columns)
    quality = 88
    while True:
        packed = BytesIO()
        sheet.save(packed, "JPEG", quality=quality, optimize=True)
        if packed.tell() <= MOST_BYTES:
            break
        quality -= 6
        if quality < 60:
            sheet = sheet.resize((sheet.width * 4 // 5, sheet.height * 4 // 5))
            quality = 88
    with replacing(path) as unfinished:
        unfinished.write_bytes(packed.getvalue())


def compose(shown: Sequence[Shown], columns: Sequence[str]) -> Image.Image:
    """Lays the cells out: a row for each heading, in the order they come."""
    rows = list(dict.fromkeys(cell.row for cell in shown))
    places = {cell.row: detail(cell.frames[0]) for cell in reversed(shown)}
    pictures = {(cell.row, cell.column): _cell(cell, places[cell.row]) for cell in shown}
    width = max(picture.width for picture in pictures.values()) + 8
    height = max(picture.height for picture in pictures.values()) + LINE + 6
    sheet = Image.new("RGB", (width * len(columns) + 8, height * len(rows) + LINE + 6), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, column in enumerate(columns):
        draw.text((8 + width * number, 2), column, "black", font)
    for line, row in enumerate(rows):
        top = LINE + 4 + height * line
        draw.text((8, top), row, "black", font)
        for number, column in enumerate(columns):
            if (row, column) in pictures:
                sheet.paste(pictures[row, column], (8 + width * number, top + LINE))
    return sheet


def detail(picture: np.ndarray) -> tuple[float, float]:
    """Finds where a picture (H, W, 3) uint8 has most edges: the centre of one of 8 x 8 cells.

    Returns:
        From the left and from the top, in units of the sides.
    """
    grey = np.asarray(Image.fromarray(picture).convert("L").resize((128, 128)), np.float32)
    edges = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    edges = np.pad(edges, (0, 1)).reshape(8, 16, 8, 16).sum((1, 3))
    row, column = np.unravel_index(edges.argmax(), edges.shape)
    return (column + 0.5) / 8, (row + 0.5) / 8


def _cell(cell: Shown, place: tuple[float, float]) -> Image.Image:
    """A picture whole and a part pixel by pixel, or three frames of a clip, with a caption."""
    first = Image.fromarray(cell.frames[0])
    if len(cell.frames) > 1:
        picked = np.linspace(0, len(cell.frames) - 1, 3).round().astype(int)
        parts = [_whole(Image.fromarray(cell.frames[number])) for number in picked]
    else:
        parts = [_whole(first), _part(first, place)]
    height = max(part.height for part in parts)
    canvas = Image.new("RGB", (sum(part.width + 2 for part in parts), height + 2 * LINE), "white")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + 2
    words = cell.caption.split(", ")
    half = (len(words) + 1) // 2
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for line, text in enumerate((words[:half], words[half:])):
        draw.text((0, height + line * LINE), ", ".join(text), "black", font)
    return canvas


def _whole(picture: Image.Image) -> Image.Image:
    scale = CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _part(picture: Image.Image, place: tuple[float, float]) -> Image.Image:
    """The square around a place, at its own pixels."""
    side = min(CELL, *picture.size)
    left, top = (
        min(max(0, round(share * length) - side // 2), length - side)
        for share, length in zip(place, picture.size, strict=True)
    )
    return picture.crop((left, top, left + side, top + side))
